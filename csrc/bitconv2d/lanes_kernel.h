// Convolution of maps of few pixels: filters lie on the lanes, and the codes of a pixel are broadcast.
//
// Vectors of pixels would be part empty (49 of 64 lanes at 7 x 7), and span rows. Here a step of K loads kV vectors of
// weights of L filters each and broadcasts four codes of each of kX pixels, wherever those lie. Where the
// epilogue is lean, codes are made as the filters lie: packed to bytes, four pixels of four filters are what lies side
// by side in memory. Other sums are turned from [pixel][filter] to the [filter][pixel] of the epilogue in memory.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"
#include "program/emit_pixels.h"

namespace {

// What becomes of sums that are turned first: they are kept, [kX][kV * L].
struct KeptSums {
    int32_t* sums;
};
template <class Result>
constexpr bool kIsKept = false;
template <>
inline constexpr bool kIsKept<KeptSums> = true;

// Sums of kX pixels, `at` bytes from the map's first. `ahead` is where the weights of the next block lie: those of
// every pixel group's steps are fetched while this block is multiplied.
template <int kV, int kX, bool kWide, class Result>
void multiply_lanes(const lbs::LanesPlan& plan, const unsigned char* in, int pixel, const int8_t* weights,
                    const int8_t* ahead, int64_t ahead_step, const Result& result) {
    const unsigned char* x[kX];
#pragma GCC unroll 16
    for (int i = 0; i < kX; ++i) x[i] = in + plan.pixel_offsets[pixel + i];
    Simd::I acc[kV][kX];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
        Simd::I start = Simd::izero();
        if constexpr (!kIsKept<Result>)
            if (plan.acc.constant) start = Simd::iload(plan.acc.constant + result.channel + v * Simd::L);
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) acc[v][i] = start;
    }
    for (int k = 0; k < plan.k_steps; ++k, weights += kV * 4 * Simd::L, ahead += ahead_step) {
        const int32_t offset = plan.k_offsets[k];
        __builtin_prefetch(ahead);
        Simd::I w[kV];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) w[v] = Simd::iload(weights + v * 4 * Simd::L);
#pragma GCC unroll 16
        for (int i = 0; i < kX; ++i) {
            const Simd::I codes = Simd::ibroadcast(x[i] + offset);
#pragma GCC unroll 4
            for (int v = 0; v < kV; ++v) acc[v][i] = Simd::template dot<kWide>(acc[v][i], codes, w[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
        if constexpr (kIsKept<Result>)
#pragma GCC unroll 16
            for (int i = 0; i < kX; ++i) Simd::istore(result.sums + (i * kV + v) * Simd::L, acc[v][i]);
        else result.template emit<kX>(v * Simd::L, pixel, acc[v]);
    }
}

template <int kV, bool kWide>
void lanes_block(const lbs::LanesPlan& plan, const lbs::RunContext& run, const lbs::LanesBlock& block,
                 const FastEmit& fast) {
    constexpr int kX = LBS_LANES_PIXELS, kFilters = kV * Simd::L;
    const unsigned char* in = run.tensors[plan.input];
    const int64_t bytes = int64_t{plan.k_steps} * kFilters * 4;
    const int64_t part = bytes / (plan.padded_pixels / kX);  // of the next block, per group of pixels
    const auto multiply = [&](int pixel, const auto& result) {
        multiply_lanes<kV, kX, kWide>(plan, in, pixel, block.weights, block.weights + bytes + pixel / kX * part,
                                      part / plan.k_steps, result);
    };
    if (plan.made.is_placed) {
        const PixelEmit emit{plan.made, fast, block.first};
        for (int pixel = 0; pixel < plan.padded_pixels; pixel += kX) multiply(pixel, emit);
        return;
    }
    int32_t* const sums = reinterpret_cast<int32_t*>(run.scratch);                           // [pixel][filter]
    int32_t* const dots = sums + int64_t{plan.padded_pixels} * LBS_LANES_VECTORS * Simd::L;  // [filter][pixel]
    const int64_t pitch = int64_t{plan.emit.vectors} * Simd::L;
    for (int pixel = 0; pixel < plan.padded_pixels; pixel += kX) multiply(pixel, KeptSums{sums + pixel * kFilters});
    alignas(64) int32_t places[Simd::L];
    for (int i = 0; i < Simd::L; ++i) places[i] = 4 * kFilters * i;
    for (int f = 0; f < kFilters; ++f)
        for (int64_t p = 0; p < pitch; p += Simd::L)
            Simd::istore(dots + f * pitch + p, Simd::igather(sums + p * kFilters + f, places));
    const int live = (plan.emit.channels - block.first + 3) / 4 * 4;
    Tile tile(fast, block.first, live < kFilters ? live : kFilters, 0, plan.emit.vectors, dots);
    tile.filter_pitch = pitch;
    tile.vector_pitch = Simd::L;
    emit_tile(fast, tile);
}

template <int kV, bool kWide>
LBS_INLINE void lanes_block_of(const lbs::LanesPlan& plan, const lbs::RunContext& run, const lbs::LanesBlock& block,
                               const FastEmit& fast) {
    if constexpr (kV > 1) {
        if (block.vectors < kV) return lanes_block_of<kV - 1, kWide>(plan, run, block, fast);
    }
    lanes_block<kV, kWide>(plan, run, block, fast);
}

void lanes_kernel(const lbs::LanesPlan& plan, const lbs::RunContext& run, int first_block, int last_block) {
    const FastEmit fast(plan.acc, plan.emit, run);
    for (int b = first_block; b < last_block; ++b) {
        if constexpr (Simd::kNarrowDot) {
            if (plan.wide) {
                lanes_block_of<LBS_LANES_VECTORS, true>(plan, run, plan.blocks[b], fast);
                continue;
            }
        }
        lanes_block_of<LBS_LANES_VECTORS, false>(plan, run, plan.blocks[b], fast);
    }
}

}  // namespace
