// Convolution of maps of few pixels: filters lie on the lanes, and the codes of a pixel are broadcast.
//
// Vectors of pixels would be part empty (49 of 64 lanes at 7 x 7), and span rows. Here a step of K loads kV vectors of
// weights of L filters each and broadcasts four codes of each of kX pixels, wherever those lie. Where the
// epilogue is lean, codes are made as the filters lie: packed to bytes, four pixels of four filters are what lies side
// by side in memory. Other sums are turned from [pixel][filter] to the [filter][pixel] of the epilogue in memory.
#pragma once

#include "bitconv2d/bitconv2d_kernel.h"

namespace {

// What is made of sums as they lie.
struct PixelEmit {
    const lbs::LanesPlan& plan;
    const FastEmit& fast;
    const int channel;

    // Filters on the lanes from `channel + first` on, of kX pixels, the first of which is `pixel`.
    template <int kX>
    LBS_INLINE void emit(int first, int pixel, const Simd::I (&sums)[kX]) const {
        const int filter = channel + first;
        if (filter >= plan.emit.channels) return;
        const Simd::F gain = Simd::fload(fast.acc->multiplier + filter), offset = Simd::fload(fast.acc->bias + filter);
#pragma GCC unroll 4
        for (int i = 0; i < kX; i += 4) {
            const int count = plan.pixels - pixel - i;
            if (count <= 0) return;
            const int most = kX - i < 4 ? kX - i : 4, four = pixel / kX * ((kX + 3) / 4) + i / 4;
            Quad y;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) y.v[j] = Simd::ffma(Simd::fcvt(sums[j < most ? i + j : i]), gain, offset);
            emit_four({filter, pixel + i, four, count < most ? count : most}, y);
        }
    }

private:
    // `count` pixels from `pixel` on, no more than four, and number `four` in tables of such.
    struct Place {
        int filter, pixel, four, count;
    };

    LBS_INLINE void emit_four(const Place& at, Quad y) const {
        const lbs::EmitPlan& e = plan.emit;
        if (fast.coded) {
            const lbs::CodedPlan& c = *fast.coded;
            const Simd::I word = load_four(at);
            y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, coded_value(c, Simd::ibytes_of(word, j))); });
        }
        Simd::I q[4];
        Simd::I lowest = fast.lowest, highest = fast.highest;
        if (fast.only) {
            unbounded_codes(*e.consumers, Simd::fset(e.consumers->scale), y, q);
        } else {
            y = through_stream(at, y);
            if (e.consumer_count == 0) return;
            bounded_integers(fast, y, q);
            lowest = Simd::izero(), highest = Simd::iset_bytes(255);
        }
        const Simd::I codes = Simd::ibytes_clamped(q[0], q[1], q[2], q[3], lowest, highest);
        store_four(at, 0, codes);
        for (int k = 1; k < e.consumer_count; ++k) store_four(at, k, scaled(e.consumers[k].of_first, codes));
    }

    // Floats of a residual added, bounds, floats stored. Slack: behind the last pixels of a channel.
    LBS_INLINE Quad through_stream(const Place& at, Quad y) const {
        const lbs::EmitPlan& e = plan.emit;
        const int64_t first = at.filter * fast.pixels + at.pixel, pitch = 4 * fast.pixels;
        if (fast.residual) {
            Simd::F x[4];
            for (int j = 0; j < 4; ++j) x[j] = Simd::fload_quarters(fast.residual + first + j * fast.pixels, pitch);
            Simd::ftranspose(x);
            for (int j = 0; j < 4; ++j) y.v[j] = Simd::fadd(y.v[j], x[j]);
        }
        if (e.has_low) y = each(y, [&](Simd::F x, int) { return Simd::fmax(x, Simd::fset(e.low)); });
        if (e.has_high) y = each(y, [&](Simd::F x, int) { return Simd::fmin(x, Simd::fset(e.high)); });
        if (fast.stream) {
            Simd::F x[4] = {y.v[0], y.v[1], y.v[2], y.v[3]};
            Simd::ftranspose(x);
            for (int j = 0; j < 4; ++j)
                Simd::fstore_quarters(fast.stream + first + j * fast.pixels, pitch, at.count, x[j]);
        }
        return y;
    }

    // Groups of four filters that are there.
    LBS_INLINE int groups(int filter) const {
        const int left = (plan.emit.channels - filter + 3) / 4;
        return left < Simd::L / 4 ? left : Simd::L / 4;
    }
    LBS_INLINE bool is_run(const lbs::LanesPixels& pixels, const Place& at) const {
        return pixels.is_run[at.four] && groups(at.filter) == Simd::L / 4;
    }
    LBS_INLINE void store_four(const Place& at, int consumer, Simd::I codes) const {
        const lbs::ConsumerPlan& c = plan.emit.consumers[consumer];
        const lbs::LanesPixels& pixels = plan.outputs[consumer];
        unsigned char* const base = fast.codes(c, at.filter);
        const int32_t* const offsets = pixels.offsets + at.pixel;
        if (__builtin_expect(is_run(pixels, at), 1))
            return Simd::istore_quarters(base + offsets[0], c.group_pitch, at.count, codes);
        store_apart(base, c.group_pitch, offsets, groups(at.filter), at.count, codes);
    }
    LBS_INLINE Simd::I load_four(const Place& at) const {
        const lbs::CodedPlan& c = *fast.coded;
        const unsigned char* const base =
            fast.run->tensors[c.tensor] + c.first + int64_t{at.filter / 4} * c.group_pitch;
        const int32_t* const offsets = plan.residual.offsets + at.pixel;
        // Slack: behind a row's last pixels.
        if (__builtin_expect(is_run(plan.residual, at), 1))
            return Simd::iload_quarters(base + offsets[0], c.group_pitch);
        return load_apart(base, c.group_pitch, offsets, groups(at.filter), at.count);
    }
    static __attribute__((noinline)) void store_apart(unsigned char* base, int64_t pitch, const int32_t* offsets,
                                                      int groups, int count, Simd::I codes) {
        int32_t words[Simd::L];
        Simd::istore(words, codes);
        for (int g = 0; g < groups; ++g)
            for (int i = 0; i < count; ++i) __builtin_memcpy(base + g * pitch + offsets[i], &words[4 * g + i], 4);
    }
    static __attribute__((noinline)) Simd::I load_apart(const unsigned char* base, int64_t pitch,
                                                        const int32_t* offsets, int groups, int count) {
        int32_t words[Simd::L] = {};
        for (int g = 0; g < groups; ++g)
            for (int i = 0; i < count; ++i) __builtin_memcpy(&words[4 * g + i], base + g * pitch + offsets[i], 4);
        return Simd::iload(words);
    }
};

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
    if (plan.is_placed) {
        const PixelEmit emit{plan, fast, block.first};
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
