// Integer convolution: tiles of kP vectors of pixels by kF filters whose accumulators stay in registers.
//
// Per step of K: a load of activations (4 channels of L pixels) per vector, a broadcast of 4 weights per filter, a dot
// per pair. Measured on a Zen 5 (two dots a cycle): 2 x 12, 3 x 8 and 6 x 4 all run at 97 % of the dot units, and hide
// the epilogue of the tile before, which runs between the parts of their K loop, but for 7 cycles per four vectors;
// tiles of fewer than 24 accumulators leave 20 of them visible.
#pragma once

#include "bitconv2d/short_kernel.h"
#include "bitconv2d/taps_kernel.h"
#include "isa/kernels.h"
#include "program/emit_tile.h"
#include "program/plan.h"

namespace {

// Bytes of weights that are fetched ahead. They are read in order, but from a cache or memory that other layers'
// weights and other programs share: on a Zen 5 with a neighbour, 512 filters of 7 x 7 pixels took 450 us without, 220
// us with.
constexpr int kWeightsAhead = 4096;

// dots[(p * kF + f) * L ...] = start[f] + sum over k of weights[k][f] . pixels of vector + p, while `before` is
// emitted.
template <int kP, int kF, int kS, bool kWide>
void conv_tile(const lbs::ConvPlan& plan, const unsigned char* in, int vector, const int8_t* weights,
               const int32_t* start, int32_t* dots, const FastEmit& fast, const Tile& before) {
    PixelLoader<kS> pixels[kP];
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) pixels[p] = PixelLoader<kS>(in, plan.map, vector + p);
    Simd::I acc[kP][kF];
#pragma GCC unroll 16
    for (int f = 0; f < kF; ++f) {
        const Simd::I first = start ? Simd::iset(start[f]) : Simd::izero();
#pragma GCC unroll 8
        for (int p = 0; p < kP; ++p) acc[p][f] = first;
    }
    const int steps = plan.k_steps, parts = before.quads + 1, part_steps = steps / parts;
    const int32_t* offsets = plan.k_offsets;
    int k = 0, emitted = 0, p_before = 0, f_before = 0;
    while (true) {
        const int end = emitted < before.quads ? k + part_steps : steps;
        for (; k < end; ++k) {
            const int32_t offset = offsets[k];
            __builtin_prefetch(weights + kWeightsAhead);
            Simd::I x[kP];
#pragma GCC unroll 8
            for (int p = 0; p < kP; ++p) x[p] = pixels[p].load(offset);
#pragma GCC unroll 16
            for (int f = 0; f < kF; ++f) {
                const Simd::I w = Simd::ibroadcast(weights + 4 * f);
#pragma GCC unroll 8
                for (int p = 0; p < kP; ++p) acc[p][f] = Simd::template dot<kWide>(acc[p][f], x[p], w);
            }
            weights += 4 * kF;
        }
        if (emitted == before.quads) break;
        emit_quad(fast, before, p_before, f_before);
        ++emitted;
        f_before += 4;
        if (f_before == before.filters) {
            f_before = 0;
            ++p_before;
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p)
#pragma GCC unroll 16
        for (int f = 0; f < kF; ++f) Simd::istore(dots + (p * kF + f) * Simd::L, acc[p][f]);
}

// A tile of `count` <= kP vectors.
template <int kP, int kF, int kS, bool kWide>
LBS_INLINE void conv_tile_up_to(const lbs::ConvPlan& plan, const unsigned char* in, int vector, int count,
                                const int8_t* weights, const int32_t* start, int32_t* dots, const FastEmit& fast,
                                const Tile& before) {
    if constexpr (kP > 1) {
        if (count < kP)
            return conv_tile_up_to<kP - 1, kF, kS, kWide>(plan, in, vector, count, weights, start, dots, fast, before);
    }
    conv_tile<kP, kF, kS, kWide>(plan, in, vector, weights, start, dots, fast, before);
}

// The codes to convolve.
inline const unsigned char* conv_input(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first, int last) {
    const unsigned char* in = run.tensors[plan.input];
    if (!plan.is_thinned) return in;
    in += plan.thinned_first;
    for (int group = 0; group < plan.groups; ++group, in += plan.group_pitch) {
        unsigned char* out = run.scratch + group * plan.thinned_pitch;
        for (int vector = first; vector < last; ++vector)
            Simd::istore(out + int64_t{4} * Simd::L * vector, PixelLoader<0>(in, plan.thinned_from, vector).load(0));
    }
    return run.scratch;
}

// All tiles of a block of kF filters; leaves the last one in `before`.
template <int kP, int kF, int kS, bool kWide>
void conv_block(const lbs::ConvPlan& plan, const lbs::RunContext& run, const unsigned char* in,
                const lbs::FilterBlock& block, int first, int last, const FastEmit& fast, Tile& before) {
    in += block.in_offset;
    int32_t* dots = run.accumulators;
    int32_t* own_sums = dots + kP * kF * Simd::L;
    const int32_t* start = plan.acc.constant && !fast.constant ? plan.acc.constant + block.first : nullptr;
    static_assert(2 * kP * kF <= lbs::kMaxTile, "the scratch holds a tile and its sums");
    for (int vector = first; vector < last; vector += kP) {
        const int count = last - vector < kP ? last - vector : kP;
        conv_tile_up_to<kP, kF, kS, kWide>(plan, in, vector, count, block.weights, start, dots, fast, before);
        before = Tile(fast, block.first, kF, vector, count, dots);
        if (block.ones) {
            conv_tile_up_to<kP, kF, kS, kWide>(plan, in, vector, count, block.ones, nullptr, own_sums, fast, Tile());
            before.sums = own_sums;
            before.own_sums = true;
        } else if (plan.shared_ones) {
            before.sums = run.sums + static_cast<int64_t>(vector) * Simd::L;
        }
    }
}

template <int kS, bool kWide>
void conv_blocks(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector,
                 int first_block, int last_block) {
    // Sums begin with their constant where nothing is done to them before it is added.
    const FastEmit fast(plan.acc, plan.emit, run, !plan.acc.shift && !plan.acc.needs_sum);
    const unsigned char* in = conv_input(plan, run, first_vector, last_vector);
    if (plan.is_short) {
        auto* const blocks = plan.tap_weights ? taps_blocks<kS, kWide> : short_blocks_of<kS, kWide>(fast);
        return blocks(plan, in, first_vector, last_vector, first_block, last_block, fast);
    }
    Tile before;  // nothing to emit yet
    if (plan.shared_ones) {
        constexpr int kP = Simd::kSumVectors;
        for (int vector = first_vector; vector < last_vector; vector += kP) {
            const int count = last_vector - vector < kP ? last_vector - vector : kP;
            int32_t* sums = run.sums + static_cast<int64_t>(vector) * Simd::L;
            conv_tile_up_to<kP, 1, kS, kWide>(plan, in, vector, count, plan.shared_ones, nullptr, sums, fast, before);
        }
    }
    for (int b = first_block; b < last_block; ++b) {
        const lbs::FilterBlock& block = plan.blocks[b];
        switch (block.width) {
#define LBS_TILE(vectors, filters)                                                                              \
    case filters:                                                                                               \
        conv_block<vectors, filters, kS, kWide>(plan, run, in, block, first_vector, last_vector, fast, before); \
        break;
            LBS_TILES(LBS_TILE)
#undef LBS_TILE
            default: break;
        }
    }
    emit_tile(fast, before);
}

template <bool kWide>
void conv_pieces(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector,
                 int first_block, int last_block) {
    switch (plan.map.pieces) {
        case 1: return conv_blocks<1, kWide>(plan, run, first_vector, last_vector, first_block, last_block);
        case 2: return conv_blocks<2, kWide>(plan, run, first_vector, last_vector, first_block, last_block);
        case 4: return conv_blocks<4, kWide>(plan, run, first_vector, last_vector, first_block, last_block);
        default: return conv_blocks<0, kWide>(plan, run, first_vector, last_vector, first_block, last_block);
    }
}

void conv_kernel(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first_vector, int last_vector,
                 int first_block, int last_block) {
    if constexpr (Simd::kNarrowDot) {
        if (plan.wide) return conv_pieces<true>(plan, run, first_vector, last_vector, first_block, last_block);
    }
    conv_pieces<false>(plan, run, first_vector, last_vector, first_block, last_block);
}

#define LBS_TILE(vectors, filters) {vectors, filters},
constexpr lbs::TileShape kTileShapes[] = {LBS_TILES(LBS_TILE){0, 0}};
#undef LBS_TILE

}  // namespace
