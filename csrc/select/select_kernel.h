// select: channels of several tensors as one, with pixels repeated by whole factors.
//
//     y[channel c, pixel] = x[places[c].channel, the pixel it repeats],   x = sources[places[c].source]
//
// Codes pass as they are: a group whose four channels are one group of an input is copied as words, others are put
// together byte by byte. Streams are emitted.
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

inline bool is_one_group(const lbs::SelectPlace* places, int live) {
    for (int j = 0; j < live; ++j)
        if (places[j].source != places[0].source || places[j].channel != places[0].channel + j) return false;
    return places[0].channel % 4 == 0;
}

void select_codes_kernel(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run, int first_group,
                         int last_group) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group) {
        const lbs::SelectPlace* places = plan.places + 4 * group;
        const bool together = is_one_group(places, e.channels - 4 * group < 4 ? e.channels - 4 * group : 4);
        unsigned char* out = run.tensors[plan.output] + group * plan.out_pitch;
        for (int vector = 0; vector < e.vectors; ++vector) {
            Simd::I word = select_words(plan.sources[places[0].source], run, places[0].channel / 4, vector);
            if (!together) {
                Simd::I q[4];
                for (int j = 0; j < 4; ++j) {
                    const lbs::SelectPlace& from = places[j];
                    const Simd::I words = select_words(plan.sources[from.source], run, from.channel / 4, vector);
                    q[j] = Simd::ibyte(words, from.channel % 4);
                }
                word = Simd::ipack4(q[0], q[1], q[2], q[3]);
            }
            store_word(out, plan.out_map, vector, vector + 1 < e.vectors ? kAll : e.tail_mask, word);
        }
    }
}

void select_streams_kernel(const lbs::SelectPlan& plan, const lbs::EmitPlan& e, const lbs::RunContext& run,
                           int first_group, int last_group) {
    constexpr uint32_t kAll = (1u << Simd::L) - 1u;
    for (int group = first_group; group < last_group; ++group)
        for (int vector = 0; vector < e.vectors; ++vector) {
            const uint32_t valid = vector + 1 < e.vectors ? kAll : e.tail_mask;
            Quad y;
            for (int j = 0; j < 4; ++j) {
                const lbs::SelectPlace& from = plan.places[4 * group + j];
                const lbs::SelectSource& source = plan.sources[from.source];
                const unsigned char* plane = run.tensors[source.tensor] + from.channel * source.pitch;
                if (source.is_whole)
                    y.v[j] = Simd::fload_mask(reinterpret_cast<const float*>(plane) + int64_t{vector} * Simd::L, valid);
                else y.v[j] = Simd::fbits(PixelLoader<0>(plane, source.map, vector).load(0));
            }
            emit4_any(e, run, 4 * group, vector, y);
        }
}

}  // namespace
