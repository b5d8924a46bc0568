// The lean epilogue of sums whose filters lie on the lanes: nothing is turned. Codes packed to bytes, four pixels of
// four filters are what lies side by side in memory; of floats each four lanes are transposed.
#pragma once

#include "program/emit_tile.h"
#include "program/plan.h"

namespace {

struct PixelEmit {
    const lbs::PixelPlan& plan;
    const FastEmit& fast;
    const int channel;

    // Filters on the lanes from `channel + first` on, of kX pixels, the first of which is `pixel`.
    template <int kX>
    LBS_INLINE void emit(int first, int pixel, const Simd::I (&sums)[kX]) const {
        const int filter = channel + first;
        if (filter >= fast.plan->channels) return;
        const Values values(fast, filter);
#pragma GCC unroll 4
        for (int i = 0; i < kX; i += 4) {
            const int count = plan.pixels - pixel - i;
            if (count <= 0) return;
            const int most = kX - i < 4 ? kX - i : 4, four = pixel / kX * ((kX + 3) / 4) + i / 4;
            Quad y;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) y.v[j] = values.of(sums[j < most ? i + j : i]);
            emit_four({filter, pixel + i, four, count < most ? count : most}, y);
        }
    }

    // Of `count` pixels of a row, from `pixel` on, no more than four.
    LBS_INLINE void emit_row(int first, int pixel, int count, Simd::I s0, Simd::I s1, Simd::I s2, Simd::I s3) const {
        const Values values(fast, channel + first);
        emit_four({channel + first, pixel, kRow, count},
                  {{values.of(s0), values.of(s1), values.of(s2), values.of(s3)}});
    }

private:
    static constexpr int kRow = -1;

    // y = fma(float(acc), M, B)
    struct Values {
        Simd::F gain, offset;
        LBS_INLINE Values(const FastEmit& fast, int filter)
            : gain(Simd::fload(fast.acc->multiplier + filter)), offset(Simd::fload(fast.acc->bias + filter)) {}
        LBS_INLINE Simd::F of(Simd::I acc) const { return Simd::ffma(Simd::fcvt(acc), gain, offset); }
    };

    // `count` pixels from `pixel` on, no more than four: number `four` in tables of such, or of a row.
    struct Place {
        int filter, pixel, four, count;
    };

    LBS_INLINE void emit_four(const Place& at, Quad y) const {
        const lbs::EmitPlan& e = *fast.plan;
        if (fast.coded) {
            const lbs::CodedPlan& c = *fast.coded;
            const Simd::I word = load_four(at);
            y = each(y, [&](Simd::F x, int j) { return Simd::fadd(x, coded_value(c, Simd::ibytes_of(word, j))); });
        }
        if (fast.only) {
            Simd::I q[4];
            unbounded_codes(e.consumers->zero, Simd::fset(e.consumers->scale), y, q);
            return store_all_four(at, Simd::ibytes_clamped(q[0], q[1], q[2], q[3], fast.lowest, fast.highest), y);
        }
        y = through_stream(at, y);
        if (e.consumer_count > 0) store_all_four(at, bounded(*e.consumers, y), y);
    }

    // What is stored for a reader, of what the step gives out.
    LBS_INLINE Simd::I bounded(const lbs::ConsumerPlan& c, Quad y) const {
        Simd::I q[4];
        bounded_integers(fast, c, y, q);
        return Simd::ibytes_clamped(q[0], q[1], q[2], q[3], Simd::izero(), Simd::iset_bytes(255));
    }
    // The codes of the first reader, and those of others.
    LBS_INLINE void store_all_four(const Place& at, Simd::I codes, Quad y) const {
        const lbs::EmitPlan& e = *fast.plan;
        store_four(at, 0, codes);
        for (int k = 1; k < e.consumer_count; ++k) {
            const lbs::ConsumerPlan& c = e.consumers[k];
            store_four(at, k, c.of_first.holds ? scaled(c.of_first, codes) : bounded(c, y));
        }
    }

    // Floats of a residual added, bounds, floats stored. Those of an output have no slack.
    LBS_INLINE Quad through_stream(const Place& at, Quad y) const {
        const lbs::EmitPlan& e = *fast.plan;
        const int64_t first = at.filter * fast.pixels + at.pixel, pitch = 4 * fast.pixels;
        if (fast.residual) {
            Simd::F x[4];
            for (int j = 0; j < 4; ++j)
                x[j] = Simd::fload_quarters(fast.residual + first + j * fast.pixels, pitch, at.count);
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
        const int left = (fast.plan->channels - filter + 3) / 4;
        return left < Simd::L / 4 ? left : Simd::L / 4;
    }
    LBS_INLINE bool is_run(const lbs::PixelOffsets& pixels, const Place& at) const {
        return (at.four == kRow ? pixels.is_joined : pixels.is_run[at.four] != 0) && groups(at.filter) == Simd::L / 4;
    }
    LBS_INLINE void store_four(const Place& at, int consumer, Simd::I codes) const {
        const lbs::ConsumerPlan& c = fast.plan->consumers[consumer];
        const lbs::PixelOffsets& pixels = plan.outputs[consumer];
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

}  // namespace
