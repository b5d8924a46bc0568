// Convolutions whose sums have few products: vectors of pixels by four filters, which end in their epilogue at once.
//
// Results need not wait in memory, as the processor's reorder buffer holds several tiles of four filters whole. On a
// Zen 5 an expanding layer of 16 channels takes 100 us instead of 160, one of 128 channels 150 instead of 162, and
// longer sums are faster as tiles.
#pragma once

#include "program/emit_tile.h"
#include "program/pixel_loader.h"
#include "program/plan.h"

namespace {

constexpr int kShortBytes = 1 << 14;  // of activations, which one group of four filters after the other reads
// Vectors that lie side by side, of four channels each, whose lines the processor does not foresee. Stores that miss
// the cache wait for each other: on a Zen 5, 64 -> 256 channels at 56 x 56 take 244 us without asking, 171 with it.
constexpr int kShortRun = 32;

__attribute__((noinline)) void emit_others(const FastEmit& fast, int channel, int vector, Simd::I a0, Simd::I a1,
                                           Simd::I a2, Simd::I a3) {
    const Simd::I sums[4] = {a0, a1, a2, a3};
    int32_t dots[4 * Simd::L];
    for (int f = 0; f < 4; ++f) Simd::istore(dots + f * Simd::L, sums[f]);
    emit_rare(fast, Tile(fast, channel, 4, vector, 1, dots), 0, 0);
}

// Four filters of a block; Emit: UsualEmit or LeanEmit.
template <int kS, bool kWide, class Emit>
struct ShortFilters {
    const lbs::PixelMap map;
    const int32_t* const offsets;
    const int steps;
    const unsigned char* const in;
    const int8_t* const weights;
    const int64_t pitch;  // of weights, from step to step
    const int channel;
    const int vectors;           // of the map
    const int32_t* const start;  // of the sums, or none
    const FastEmit& fast;
    const bool asks;  // for the lines of the next four filters
    const Emit emit;

    LBS_INLINE ShortFilters(const lbs::ConvPlan& plan, const unsigned char* in_, const lbs::FilterBlock& block,
                            int filter, const FastEmit& fast_, bool asks_)
        : map(plan.map),
          offsets(plan.k_offsets),
          steps(plan.k_steps),
          in(in_ + block.in_offset),
          weights(block.weights + 4 * filter),
          pitch(4 * block.width),
          channel(block.first + filter),
          vectors(plan.emit.vectors),
          start(plan.acc.constant ? plan.acc.constant + channel : nullptr),
          fast(fast_),
          asks(asks_),
          emit(fast_, channel) {}

    // kP vectors of pixels.
    template <int kP>
    LBS_INLINE void compute(int vector) const {
        PixelLoader<kS> pixels[kP];
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) pixels[p] = PixelLoader<kS>(in, map, vector + p);
        Simd::I acc[kP][4];
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) {
            const Simd::I first = start ? Simd::iset(start[f]) : Simd::izero();
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) acc[p][f] = first;
        }
        const int8_t* row = weights;
        for (int k = 0; k < steps; ++k, row += pitch) {
            Simd::I x[kP];
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) x[p] = pixels[p].load(offsets[k]);
#pragma GCC unroll 4
            for (int f = 0; f < 4; ++f) {
                const Simd::I w = Simd::ibroadcast(row + 4 * f);
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) acc[p][f] = Simd::template dot<kWide>(acc[p][f], x[p], w);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p)
#pragma GCC unroll 4
            for (int f = 0; f < 4; ++f) Simd::settle(acc[p][f]);
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) {
            if (__builtin_expect(!emit.takes(vector + p, vectors), 0)) {
                emit_others(fast, channel, vector + p, acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
                continue;
            }
            if (asks) emit.ask_next(vector + p);
            emit.emit(vector + p, acc[p][0], acc[p][1], acc[p][2], acc[p][3]);
        }
    }
};

template <int kS, bool kWide, class Emit>
void short_blocks(const lbs::ConvPlan& plan, const unsigned char* in, int first, int last, int first_block,
                  int last_block, const FastEmit& fast) {
    constexpr int kP = Simd::kShortVectors;
    int band = kShortBytes / (plan.k_steps * 4 * Simd::L) / kP * kP;
    if (band < kP) band = kP;
    const bool asks = band <= kShortRun;
    for (int begin = first; begin < last; begin += band) {
        const int end = last - begin < band ? last : begin + band;
        for (int b = first_block; b < last_block; ++b) {
            const lbs::FilterBlock& block = plan.blocks[b];
            for (int f = 0; f < block.width; f += 4) {
                const ShortFilters<kS, kWide, Emit> filters(plan, in, block, f, fast, asks);
                int vector = begin;
                for (; vector + kP <= end; vector += kP) filters.template compute<kP>(vector);
                if constexpr (kP > 2)
                    for (; vector + 2 <= end; vector += 2) filters.template compute<2>(vector);
                for (; vector < end; ++vector) filters.template compute<1>(vector);
            }
        }
    }
}

template <int kS, bool kWide>
auto short_blocks_of(const FastEmit& fast) {
    if (fast.is_usual(2))
        return fast.coded ? short_blocks<kS, kWide, UsualEmit<2, true>> : short_blocks<kS, kWide, UsualEmit<2, false>>;
    if (fast.is_usual())
        return fast.coded ? short_blocks<kS, kWide, UsualEmit<1, true>> : short_blocks<kS, kWide, UsualEmit<1, false>>;
    return short_blocks<kS, kWide, LeanEmit>;
}

}  // namespace
