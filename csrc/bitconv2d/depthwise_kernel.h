// Depthwise convolution: four channels at a time, row by row.
//
// An input row is spread once: a 32-bit lane then holds the codes of one channel under four neighbouring taps of one
// output pixel, and a dot sums four products of that channel. Rows stay spread for all output rows that meet them. Dots
// go to memory in the order of pixels, where the vectors of the epilogue, which may span rows, are taken up a little
// later, while the next ones are computed.
//
//     spread[quad][x][c] = in[c][x * stride + (4 quad + 0 .. 3) * dilation]
//     dots[c][x] = sum over rows and quads of spread[quad][x][c] . weights[row][quad][c]
#pragma once

#include <cstring>

#include "program/emit_tile.h"
#include "program/plan.h"

namespace {

// Vectors between the dots and their epilogue: those that span two rows cannot be loaded while they are being stored.
constexpr int kLag = 3;

// One input row: [quad][vector][4 channels][L].
LBS_INLINE void spread_row(const lbs::DepthwisePlan& plan, const unsigned char* in, int32_t* out) {
    for (int quad = 0; quad < plan.quads; ++quad) {
        const int32_t* taps = plan.taps + 4 * quad;
        const unsigned char* pixels[4] = {in + taps[0], in + taps[1], in + taps[2], in + taps[3]};
        for (int32_t* const end = out + int64_t{4} * plan.spread; out != end; out += 4 * Simd::L) {
            Simd::I codes[4];
            for (int tap = 0; tap < 4; ++tap) {
                codes[tap] = Simd::iload(pixels[tap]);  // Slack: a spread row is whole vectors
                pixels[tap] += 4 * Simd::L;
            }
            Simd::transpose_bytes(codes);
            for (int c = 0; c < 4; ++c) Simd::istore(out + c * Simd::L, codes[c]);
        }
    }
}

// Dots of one vector of four channels, at dots + c * pitch. kQuads: of the whole kernel, whose weights stay in
// registers, or 0 for any number.
template <int kQuads, bool kWide>
struct DepthwiseDots {
    Simd::I weights[4 * kQuads];
    DepthwiseDots(const int8_t* from, int) {
        for (int i = 0; i < 4 * kQuads; ++i) weights[i] = Simd::ibroadcast(from + 4 * i);
    }
    LBS_INLINE void operator()(const int32_t* const* rows, int at, int32_t* dots, int pitch) const {
        for (int c = 0; c < 4; ++c) {
            Simd::I acc = Simd::izero();
            for (int i = 0; i < kQuads; ++i)
                acc = Simd::template dot<kWide>(acc, Simd::iload(rows[i] + at + c * Simd::L), weights[4 * i + c]);
            Simd::istore(dots + c * pitch, acc);
        }
    }
};

template <bool kWide>
struct DepthwiseDots<0, kWide> {
    const int8_t* weights;
    int quads;
    DepthwiseDots(const int8_t* from, int quads_) : weights(from), quads(quads_) {}
    LBS_INLINE void operator()(const int32_t* const* rows, int at, int32_t* dots, int pitch) const {
        Simd::I acc[4] = {Simd::izero(), Simd::izero(), Simd::izero(), Simd::izero()};
        for (int i = 0; i < quads; ++i)
            for (int c = 0; c < 4; ++c)
                acc[c] = Simd::template dot<kWide>(acc[c], Simd::iload(rows[i] + at + c * Simd::L),
                                                   Simd::ibroadcast(weights + 16 * i + 4 * c));
        for (int c = 0; c < 4; ++c) Simd::istore(dots + c * pitch, acc[c]);
    }
};

// The epilogue of one group, vector by vector.
struct DepthwiseEmit {
    const FastEmit& fast;
    Tile tile;
    const int64_t sums;  // integers from dots to sums, 0: none
    const int vectors;
    const UsualEmit<1, false> usual;

    LBS_INLINE DepthwiseEmit(const FastEmit& f, int channel, int vector, const int32_t* dots, int pitch, int64_t sums_)
        : fast(f), tile(f, channel, 4, vector, 1, dots), sums(sums_), vectors(f.plan->vectors), usual(f, channel) {
        tile.filter_pitch = pitch;
        tile.own_sums = true;
    }
    LBS_INLINE void next() {
        if (fast.plain && !fast.constant && usual.takes(tile.vector, vectors)) {
            const int32_t* const dots = tile.dots;
            const int64_t pitch = tile.filter_pitch;
            usual.emit(tile.vector, Simd::iload(dots), Simd::iload(dots + pitch), Simd::iload(dots + 2 * pitch),
                       Simd::iload(dots + 3 * pitch));
        } else {
            any();
        }
        ++tile.vector;
        tile.dots += Simd::L;
    }
    __attribute__((noinline)) void any() const {
        Tile one(fast, tile.channel, 4, tile.vector, 1, tile.dots);
        one.filter_pitch = tile.filter_pitch;
        one.own_sums = true;
        one.sums = sums ? tile.dots + sums : nullptr;
        emit_quad(fast, one, 0, 0);
    }
};

// Vectors [first, last) of a group of four channels.
template <int kQuads, bool kWide>
void depthwise_group(const lbs::DepthwisePlan& plan, const lbs::RunContext& run, const FastEmit& fast, int group,
                     int first, int last) {
    constexpr int L = Simd::L;
    const int quads = plan.kernel_rows * plan.quads, width = plan.width, kept = plan.kept;
    const int64_t row_size = int64_t{4} * plan.quads * plan.spread;
    const DepthwiseDots<kQuads, kWide> multiply(plan.weights + static_cast<int64_t>(group) * 16 * quads, quads);
    const DepthwiseDots<0, false> add(plan.ones, quads);
    const unsigned char* in = run.tensors[plan.input] + plan.first + group * plan.group_pitch;
    int32_t* const spread = run.rows;
    int32_t* const dots = spread + plan.ring * row_size;
    const int64_t sums = plan.ones ? int64_t{4} * kept : 0;  // behind the dots
    const int first_row = static_cast<int>(int64_t{first} * L / width);
    const int64_t end_pixel = int64_t{last} * L < fast.pixels ? int64_t{last} * L : fast.pixels;
    int64_t base = int64_t{first_row} * width;  // the pixel whose dot lies first
    DepthwiseEmit emit(fast, 4 * group, first, dots + (int64_t{first} * L - base), kept, sums);
    const int32_t* rows[kQuads > 0 ? kQuads : lbs::kMaxQuads];
    int top_slot = 0;                                   // where the topmost row of the kernel is in the ring
    int next = first_row * plan.stride, next_slot = 0;  // the row that is spread next
    for (int y = first_row; int64_t{y} * width < end_pixel; ++y) {
        const int top = y * plan.stride, bottom = top + plan.ring;
        if (next < top) next = top, next_slot = top_slot;
        for (; next < bottom; ++next) {
            const unsigned char* source = in + next * plan.row_pitch;
            // Rows of one group lie a page apart or more, which no prefetcher follows.
            for (int64_t byte = 0; byte < plan.group_pitch; byte += 64)
                __builtin_prefetch(source + 2 * plan.row_pitch + byte);
            spread_row(plan, source, spread + next_slot * row_size);
            if (++next_slot == plan.ring) next_slot = 0;
        }
        for (int quad = 0, slot = top_slot; quad < quads;) {
            for (int q = 0; q < plan.quads; ++q) rows[quad++] = spread + slot * row_size + int64_t{4} * q * plan.spread;
            slot += plan.dilation;
            if (slot >= plan.ring) slot -= plan.ring;
        }
        top_slot = (top_slot + plan.stride) % plan.ring;
        int64_t at = int64_t{y} * width - base;
        if (at + width + L > kept) {  // what is not emitted yet moves to the front
            const int64_t gone = emit.tile.dots - dots;
            for (int c = 0; c < (sums ? 8 : 4); ++c)
                std::memmove(dots + c * kept, dots + c * kept + gone, static_cast<size_t>(at - gone) * 4);
            base += gone;
            at -= gone;
            emit.tile.dots = dots;
        }
        int32_t* place = dots + at;
        for (int x = 0; x < width; x += L, place += L) {
            multiply(rows, 4 * x, place, kept);
            if (sums) add(rows, 4 * x, place + sums, kept);
            if (place - emit.tile.dots >= kLag * L && emit.tile.vector < last) emit.next();
        }
    }
    while (emit.tile.vector < last) emit.next();
}

// Vectors [first, last) of all groups in a row.
template <int kQuads, bool kWide>
void depthwise_groups(const lbs::DepthwisePlan& plan, const lbs::RunContext& run, int64_t first, int64_t last) {
    const FastEmit fast(plan.acc, plan.emit, run);
    const int vectors = plan.emit.vectors;
    for (int64_t group = first / vectors; group * vectors < last; ++group) {
        const int64_t begin = first - group * vectors, end = last - group * vectors;
        depthwise_group<kQuads, kWide>(plan, run, fast, static_cast<int>(group),
                                       begin > 0 ? static_cast<int>(begin) : 0,
                                       end < vectors ? static_cast<int>(end) : vectors);
    }
}

template <bool kWide>
void depthwise_rows(const lbs::DepthwisePlan& plan, const lbs::RunContext& run, int64_t first, int64_t last) {
    if (plan.kernel_rows * plan.quads == 3) return depthwise_groups<3, kWide>(plan, run, first, last);
    depthwise_groups<0, kWide>(plan, run, first, last);
}

void depthwise_kernel(const lbs::DepthwisePlan& plan, const lbs::RunContext& run, int64_t first, int64_t last) {
    if constexpr (Simd::kNarrowDot) {
        if (plan.wide) return depthwise_rows<true>(plan, run, first, last);
    }
    depthwise_rows<false>(plan, run, first, last);
}

}  // namespace
