// Integer convolution: tiles of kP vectors of pixels by kF filters whose accumulators stay in registers.
//
// Per step of K: kP loads of activations (4 channels of L pixels each), kF broadcasts of 4 weights, kP * kF dot
// instructions. The two kinds of load are what limits a tile: (kP + kF) / (kP * kF) loads per dot.
#pragma once

#include "program/emit_kernel.h"
#include "program/plan.h"

namespace {

// One vector of input pixels at `base`; kS pieces, 0 for one offset per lane.
template <int kS>
struct PixelLoader {
    const unsigned char* base[kS > 0 ? kS : 1];
    uint32_t mask[kS > 0 ? kS : 1];
    const int32_t* lanes;

    PixelLoader() = default;
    PixelLoader(const unsigned char* in, const lbs::PixelMap& map, int vector) {
        if constexpr (kS == 0) {
            base[0] = in;
            lanes = map.lanes + static_cast<int64_t>(vector) * lbs::kMaxLanes;
        } else {
            const lbs::Piece* piece = map.table + static_cast<int64_t>(vector) * kS;
            for (int s = 0; s < kS; ++s) {
                base[s] = in + piece[s].offset;
                mask[s] = piece[s].mask;
            }
        }
    }
    Simd::I load(int32_t offset) const {
        if constexpr (kS == 0) {
            return Simd::igather(base[0] + offset, lanes);
        } else {
            // The first piece starts at lane 0; what is read past its end is replaced by the others, or never used.
            Simd::I x = Simd::iload(base[0] + offset);
            for (int s = 1; s < kS; ++s) x = Simd::iload_mask(x, mask[s], base[s] + offset);
            return x;
        }
    }
};

// dots[(p * kF + f) * L ...] = sum over k of weights[k][f] . pixels of vector + p
template <int kP, int kF, int kS, bool kWide>
void conv_tile(const lbs::ConvPlan& plan, const unsigned char* in, int vector, const int8_t* weights, int32_t* dots) {
    PixelLoader<kS> pixels[kP];
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) pixels[p] = PixelLoader<kS>(in, plan.map, vector + p);
    Simd::I acc[kP][kF];
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p)
#pragma GCC unroll 16
        for (int f = 0; f < kF; ++f) acc[p][f] = Simd::izero();
    const int steps = plan.k_steps;
    const int32_t* offsets = plan.k_offsets;
    for (int k = 0; k < steps; ++k) {
        const int32_t offset = offsets[k];
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
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p)
#pragma GCC unroll 16
        for (int f = 0; f < kF; ++f) Simd::istore(dots + (p * kF + f) * Simd::L, acc[p][f]);
}

template <int kP, int kF, bool kWide>
void conv_tile_pieces(const lbs::ConvPlan& plan, const unsigned char* in, int vector, const int8_t* weights, int32_t* dots) {
    switch (plan.map.pieces) {
        case 1: return conv_tile<kP, kF, 1, kWide>(plan, in, vector, weights, dots);
        case 2: return conv_tile<kP, kF, 2, kWide>(plan, in, vector, weights, dots);
        case 4: return conv_tile<kP, kF, 4, kWide>(plan, in, vector, weights, dots);
        default: return conv_tile<kP, kF, 0, kWide>(plan, in, vector, weights, dots);
    }
}

// A tile of `count` <= kP vectors.
template <int kP, int kF, bool kWide>
void conv_tile_up_to(const lbs::ConvPlan& plan, const unsigned char* in, int vector, int count, const int8_t* weights,
                     int32_t* dots) {
    if constexpr (kP > 1) {
        if (count < kP) return conv_tile_up_to<kP - 1, kF, kWide>(plan, in, vector, count, weights, dots);
    }
    conv_tile_pieces<kP, kF, kWide>(plan, in, vector, weights, dots);
}

// sums[vector * L ...]: the window's sum of codes, shared by all filters of a layer without groups.
template <int kP, bool kWide>
void conv_sums(const lbs::ConvPlan& plan, const lbs::RunContext& run, int first, int last) {
    const unsigned char* in = run.tensors[plan.input];
    for (int vector = first; vector < last; vector += kP) {
        const int count = last - vector < kP ? last - vector : kP;
        conv_tile_up_to<kP, 1, kWide>(plan, in, vector, count, plan.shared_ones, run.sums + static_cast<int64_t>(vector) * Simd::L);
    }
}

// All tiles of one block of kF filters over the vectors [first, last).
template <int kP, int kF, bool kWide>
void conv_block(const lbs::ConvPlan& plan, const lbs::RunContext& run, const lbs::FilterBlock& block, int first, int last) {
    const unsigned char* in = run.tensors[plan.input] + block.in_offset;
    int32_t* dots = run.accumulators;
    int32_t* own_sums = dots + kP * kF * Simd::L;
    static_assert(2 * kP * kF <= lbs::kMaxTile, "the scratch holds a tile and its sums");
    for (int vector = first; vector < last; vector += kP) {
        const int count = last - vector < kP ? last - vector : kP;
        conv_tile_up_to<kP, kF, kWide>(plan, in, vector, count, block.weights, dots);
        if (block.ones) conv_tile_up_to<kP, kF, kWide>(plan, in, vector, count, block.ones, own_sums);
        for (int p = 0; p < count; ++p) {
            for (int f = 0; f < kF; f += 4) {
                const int row = (p * kF + f) * Simd::L;
                const int32_t* sums = nullptr;
                if (block.ones) sums = own_sums + row;
                else if (plan.acc.needs_sum) sums = run.sums + static_cast<int64_t>(vector + p) * Simd::L;
                finish4(plan.acc, plan.emit, run, block.first + f, vector + p, dots + row, Simd::L, sums, block.ones ? Simd::L : 0);
            }
        }
    }
}

}  // namespace
