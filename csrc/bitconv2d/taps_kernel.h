// Depthwise convolution with few taps and the usual epilogue: four taps together, nothing in between.
//
// Four vectors of pixels under four neighbouring taps, interleaved byte by byte, are four vectors of sums: lane 4 b + c
// of the i-th holds what channel c of pixel 4 b + i meets, so that a dot multiplies nothing but that, and every lane's
// factors are those of its channel. Packed to bytes, the four are a vector of pixels as it is stored. On a Zen 5
// 96 channels of 112 x 112 pixels take 112 us so, and 121 as sums over four channels, three of them times zero; 960 of
// 7 x 7 11 us and 18.
#pragma once

#include "bitconv2d/short_kernel.h"

namespace {

// A group of four channels; kQuads: of taps, whose weights stay in registers, or 0 for any number.
template <int kS, int kQuads, bool kWide>
struct Taps {
    const lbs::PixelMap map;
    const int32_t* const offsets;
    const int8_t* const weights;
    const unsigned char* const in;
    const int quads;  // of four taps each
    const bool has_last;
    const bool asks;
    const Simd::F gain, offset;
    const Simd::I start;
    const UsualCodes codes;
    Simd::I kept[kQuads + 1];

    LBS_INLINE Taps(const lbs::ConvPlan& plan, const unsigned char* in_, const lbs::FilterBlock& block,
                    const FastEmit& fast, bool asks_)
        : map(plan.map),
          offsets(plan.tap_offsets),
          weights(plan.tap_weights + int64_t{block.first} * 4 * plan.tap_quads),
          in(in_ + block.in_offset),
          quads(kQuads ? kQuads : plan.tap_quads - plan.last_alone),
          has_last(kQuads || plan.last_alone),
          asks(asks_),
          gain(Simd::fbits(Simd::iquarters(plan.acc.multiplier + block.first))),
          offset(Simd::fbits(Simd::iquarters(plan.acc.bias + block.first))),
          start(plan.acc.constant ? Simd::iquarters(plan.acc.constant + block.first) : Simd::izero()),
          codes(fast, block.first, false) {
        for (int i = 0; i <= kQuads; ++i) kept[i] = Simd::iquarters(weights + 16 * i);
    }

    LBS_INLINE void compute(int vector) const {
        const PixelLoader<kS> pixels(in, map, vector);
        Simd::I acc[4] = {start, start, start, start};
#pragma GCC unroll 2
        for (int quad = 0; quad < quads; ++quad) {
            Simd::I x[4];
            for (int tap = 0; tap < 4; ++tap) x[tap] = pixels.load(offsets[4 * quad + tap]);
            Simd::interleave_bytes(x);
            const Simd::I w = kQuads ? kept[quad] : Simd::iquarters(weights + 16 * quad);
            for (int i = 0; i < 4; ++i) acc[i] = Simd::template dot<kWide>(acc[i], x[i], w);
        }
        if (has_last) {
            const Simd::I x = pixels.load(offsets[4 * quads]);
            const Simd::I w = kQuads ? kept[kQuads] : Simd::iquarters(weights + 16 * quads);
            for (int i = 0; i < 4; ++i) acc[i] = Simd::template dot<kWide>(acc[i], Simd::ibytes_of(x, i), w);
        }
        Quad y;
        for (int i = 0; i < 4; ++i) y.v[i] = Simd::ffma(Simd::fcvt(acc[i]), gain, offset);
        Simd::I q[4];
        unbounded_codes(codes.zero, codes.scale, y, q);
        if (asks) codes.ask_next(vector);
        codes.store(vector, Simd::ibytes_clamped(q[0], q[1], q[2], q[3], codes.lowest, codes.highest));
    }
};

template <int kS, int kQuads, bool kWide>
void taps_groups(const lbs::ConvPlan& plan, const unsigned char* in, int first, int last, int first_block,
                 int last_block, const FastEmit& fast) {
    const int band = kShortBytes / (16 * plan.tap_quads * Simd::L);
    const bool asks = band <= kShortRun;
    for (int begin = first; begin < last; begin += band) {
        const int end = last - begin < band ? last : begin + band;
        for (int b = first_block; b < last_block; ++b) {
            const Taps<kS, kQuads, kWide> taps(plan, in, plan.blocks[b], fast, asks);
            for (int vector = begin; vector < end; ++vector) taps.compute(vector);
        }
    }
}

template <int kS, bool kWide>
void taps_blocks(const lbs::ConvPlan& plan, const unsigned char* in, int first, int last, int first_block,
                 int last_block, const FastEmit& fast) {
    if (plan.last_alone && plan.tap_quads == 3)
        return taps_groups<kS, 2, kWide>(plan, in, first, last, first_block, last_block, fast);
    taps_groups<kS, 0, kWide>(plan, in, first, last, first_block, last_block, fast);
}

}  // namespace
