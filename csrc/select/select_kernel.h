// select: channels of several tensors as one, with pixels repeated by whole factors.
//
//     y[channel c, pixel] = x[places[c].channel, the pixel it repeats],   x = sources[places[c].source]
//
// Codes pass as they are: groups of four channels that follow each other in an input are copied row by row (28 x 28
// pixels of 256 channels in 2.2 us, 12.8 us vector by vector, on one core of a Zen 5), repeated ones vector by vector,
// others are put together byte by byte. Streams are emitted.
//
// Where pixels are moved, each place of a block (the remainders of row and column) has channels of its own, of pixels
// whose row and column are looked up. Where pixels that are read lie side by side, codes are put together a vector at a
// time, and go to their columns word by word.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "program/plan.h"

namespace {

LBS_INLINE Simd::I select_words(const lbs::SelectSource& source, const lbs::RunContext& run, int group, int vector) {
    const unsigned char* in = run.tensors[source.tensor] + source.first + group * source.pitch;
    switch (source.map.pieces) {
        case 1: return PixelLoader<1>(in, source.map, vector).load(0);
        case 2: return PixelLoader<2>(in, source.map, vector).load(0);
        case 4: return PixelLoader<4>(in, source.map, vector).load(0);
        default: return PixelLoader<0>(in, source.map, vector).load(0);
    }
}

// Whether the channels of a group, of which `live` exist, are one group of an input.
inline bool is_one_group(const lbs::SelectPlace* places, int live) {
    for (int j = 0; j < live; ++j)
        if (places[j].source != places[0].source || places[j].channel != places[0].channel + j) return false;
    return places[0].channel % 4 == 0;
}

// How many groups from `group` on follow each other in an input whose rows lie as those of the output.
inline int groups_alike(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, int group, int last_group) {
    const lbs::SelectPlace first = plan.places[4 * group];
    if (!plan.sources[first.source].is_alike) return 0;
    int count = 0;
    for (; group + count < last_group; ++count) {
        const lbs::SelectPlace* places = plan.places + 4 * (group + count);
        const int left = e.channels - 4 * (group + count);
        const bool follows = places[0].source == first.source && places[0].channel == first.channel + 4 * count;
        if (!follows || !is_one_group(places, left < 4 ? left : 4)) break;
    }
    return count;
}

void copy_groups(const lbs::SelectPlan& plan, const lbs::RunContext& run, int group, int count) {
    const lbs::SelectPlace from = plan.places[4 * group];
    const lbs::SelectSource& source = plan.sources[from.source];
    const unsigned char* in = run.tensors[source.tensor] + source.row + from.channel / 4 * source.pitch;
    unsigned char* out = run.tensors[plan.output] + plan.out_row + int64_t{group} * plan.out_pitch;
    for (int row = 0; row < plan.rows; ++row)
        __builtin_memcpy(out + row * plan.out_row_pitch, in + row * source.row_pitch,
                         static_cast<size_t>(count) * static_cast<size_t>(source.pitch));
}

// One row of one group at one column of a block.
inline void move_row(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run, int group,
                     int row, int first_column, const lbs::SelectPlace* places, unsigned char* out) {
    const int left = e.channels - 4 * group, live = left < 4 ? left : 4;
    const unsigned char* in[4];
    const int64_t* columns[4];
    for (int j = 0; j < 4; ++j) {
        const lbs::SelectSource& source = plan.sources[places[j].source];
        in[j] = run.tensors[source.tensor] + source.rows[row] + places[j].channel / 4 * source.pitch;
        columns[j] = source.columns;
    }
    const bool together = is_one_group(places, live);
    bool is_dense = true;
    for (int j = 0; j < (together ? 1 : 4); ++j) is_dense = is_dense && plan.sources[places[j].source].is_dense;
    if (is_dense) {
        const int count = (plan.width - first_column + plan.block_columns - 1) / plan.block_columns;
        for (int n = 0; n < count; n += Simd::L) {
            // Slack: columns are read as whole vectors, here and below.
            Simd::I word = Simd::iload(in[0] + columns[0][first_column] + 4 * n);
            if (!together) {
                Simd::I q[4];
                for (int j = 0; j < 4; ++j)
                    q[j] = Simd::ibyte(Simd::iload(in[j] + columns[j][first_column] + 4 * n), places[j].channel % 4);
                word = Simd::ipack4(q[0], q[1], q[2], q[3]);
            }
            int32_t words[Simd::L];
            Simd::istore(words, word);
            const int lanes = count - n < Simd::L ? count - n : Simd::L;
            const int64_t* columns_out = plan.out_columns + first_column + n * plan.block_columns;
            for (int lane = 0; lane < lanes; ++lane)
                __builtin_memcpy(out + columns_out[lane * plan.block_columns], words + lane, 4);
        }
        return;
    }
    for (int w = first_column; w < plan.width; w += plan.block_columns)
        for (int j = 0; j < 4; ++j) out[plan.out_columns[w] + j] = in[j][columns[j][w] + places[j].channel % 4];
}

void move_codes(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run, int first_group,
                int last_group) {
    for (int row = 0; row < plan.height; ++row)
        for (int group = first_group; group < last_group; ++group) {
            unsigned char* out =
                run.tensors[plan.output] + plan.out_rows[row] + int64_t{group} * plan.out_pitch;
            for (int column = 0; column < plan.block_columns; ++column) {
                const int64_t block = int64_t{row % plan.block_rows} * plan.block_columns + column;
                const lbs::SelectPlace* places = plan.places + 4 * (block * plan.groups + group);
                move_row(plan, e, run, group, row, column, places, out);
            }
        }
}

void move_streams(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run, int first_group,
                  int last_group) {
    for (int group = first_group; group < last_group; ++group)
        for (int vector = 0; vector < e.vectors; ++vector) {
            float lanes[4][Simd::L] = {};
            const int64_t first = int64_t{vector} * Simd::L;
            int row = static_cast<int>(first / plan.width), column = static_cast<int>(first % plan.width);
            for (int lane = 0; lane < Simd::L && row < plan.height; ++lane) {
                const int64_t block = int64_t{row % plan.block_rows} * plan.block_columns + column % plan.block_columns;
                const lbs::SelectPlace* places = plan.places + 4 * (block * plan.groups + group);
                for (int j = 0; j < 4; ++j) {
                    const lbs::SelectSource& source = plan.sources[places[j].source];
                    const unsigned char* plane = run.tensors[source.tensor] + places[j].channel * source.pitch;
                    __builtin_memcpy(&lanes[j][lane], plane + source.rows[row] + source.columns[column], 4);
                }
                if (++column == plan.width) {
                    column = 0;
                    ++row;
                }
            }
            Quad y;
            for (int j = 0; j < 4; ++j) y.v[j] = Simd::fload_mask(lanes[j], (1u << Simd::L) - 1u);
            emit4_any(e, run, 4 * group, vector, y);
        }
}

void select_codes_kernel(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run,
                         int first_group, int last_group) {
    if (plan.height) return move_codes(plan, e, run, first_group, last_group);
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group) {
        if (const int count = groups_alike(plan, e, group, last_group)) {
            copy_groups(plan, run, group, count);
            group += count - 1;
            continue;
        }
        const lbs::SelectPlace* places = plan.places + 4 * group;
        const bool together = is_one_group(places, e.channels - 4 * group < 4 ? e.channels - 4 * group : 4);
        unsigned char* out = run.tensors[plan.output] + int64_t{group} * plan.out_pitch;
        for (int vector = 0; vector < e.vectors; ++vector) {
            Simd::I word = select_words(plan.sources[places[0].source], run, places[0].channel / 4, vector);
            if (!together) {
                Simd::I q[4] = {Simd::ibyte(word, places[0].channel % 4)};
                for (int j = 1; j < 4; ++j) {
                    const lbs::SelectSource& source = plan.sources[places[j].source];
                    q[j] = Simd::ibyte(select_words(source, run, places[j].channel / 4, vector), places[j].channel % 4);
                }
                word = Simd::ipack4(q[0], q[1], q[2], q[3]);
            }
            store_word(out, plan.out_map, vector, vector + 1 < e.vectors ? kAll : e.tail_mask, word);
        }
    }
}

void select_streams_kernel(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run,
                           int first_group, int last_group) {
    if (plan.height) return move_streams(plan, e, run, first_group, last_group);
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group)
        for (int vector = 0; vector < e.vectors; ++vector) {
            const uint32_t valid = vector + 1 < e.vectors ? kAll : e.tail_mask;
            Quad y;
            for (int j = 0; j < 4; ++j) {
                const lbs::SelectPlace& from = plan.places[4 * group + j];
                const lbs::SelectSource& source = plan.sources[from.source];
                const unsigned char* plane = run.tensors[source.tensor] + from.channel * source.pitch;
                if (source.is_alike)
                    y.v[j] = Simd::fload_mask(reinterpret_cast<const float*>(plane) + int64_t{vector} * Simd::L, valid);
                else y.v[j] = Simd::fbits(PixelLoader<0>(plane, source.map, vector).load(0));
            }
            emit4_any(e, run, 4 * group, vector, y);
        }
}

}  // namespace
