// Kernels of fakequant.h over the Simd type of the translation unit.
#pragma once

#include <type_traits>

#include "fakequant/fakequant.h"

namespace {

constexpr int64_t kSumBlock = 2048;  // elements summed in float32 before the sum moves to float64

template <bool kBf16>
Simd::F fq_load(const void* p, int64_t i) {
    if constexpr (kBf16) return Simd::fload_bf16(static_cast<const uint16_t*>(p) + i);
    else return Simd::fload(static_cast<const float*>(p) + i);
}

template <bool kBf16>
void fq_store(void* p, int64_t i, Simd::F a) {
    if constexpr (kBf16) Simd::fstore_bf16(static_cast<uint16_t*>(p) + i, a);
    else Simd::fstore(static_cast<float*>(p) + i, a);
}

// The last count < L elements, copied into a whole vector padded with zeros: kSize bytes each.
template <bool kBf16>
struct Tail {
    static constexpr int kSize = kBf16 ? 2 : 4;
    alignas(64) unsigned char bytes[Simd::L * 4] = {};
    Tail() = default;
    Tail(const void* p, int64_t i, int64_t count) {
        __builtin_memcpy(bytes, static_cast<const char*>(p) + i * kSize, static_cast<size_t>(count) * kSize);
    }
    void put(void* p, int64_t i, int64_t count) const {
        __builtin_memcpy(static_cast<char*>(p) + i * kSize, bytes, static_cast<size_t>(count) * kSize);
    }
};

template <bool kSigned>
struct WidthLanes {
    Simd::F scale, step, n, half, lowest, highest;
    explicit WidthLanes(const lbs::QuantWidths& w, int j)
        : scale(Simd::fset(w.scale[j])), step(Simd::fset(w.step[j])), n(Simd::fset(w.n[j])),
          half(Simd::fset(w.n[j] / 2)), lowest(Simd::fset(-w.zero[j])), highest(Simd::fset(w.n[j] - w.zero[j])) {}

    // Bounds first: the kernels' max and min return their second operand for not-a-number, which lets it through;
    // rounding after clamping is the same, the bounds being integers.
    Simd::F value(Simd::F x) const {
        Simd::F t = Simd::fmul(x, scale);
        if constexpr (kSigned) t = Simd::fadd(t, half);
        const Simd::F q = Simd::fround(Simd::fmin(highest, Simd::fmax(lowest, t)));
        if constexpr (kSigned) return Simd::fmul(Simd::fsub(Simd::fadd(q, q), n), step);
        else return Simd::fmul(q, step);
    }
};

// Calls many(i) for whole vectors and last(i, count) for the rest; flush() after every kSumBlock elements.
template <class Many, class Last, class Flush>
void fq_blocks(int64_t begin, int64_t end, const Many& many, const Last& last, const Flush& flush) {
    int64_t i = begin;
    while (i + Simd::L <= end) {
        const int64_t stop = i + kSumBlock < end ? i + kSumBlock : end;
        for (; i + Simd::L <= stop; i += Simd::L) many(i);
        flush();
    }
    if (i < end) {
        last(i, end - i);
        flush();
    }
}

template <bool kBf16, bool kSigned, int kCoarse>
lbs::QuantSums fq_forward(const lbs::FakeQuantForward& t, int64_t begin, int64_t end) {
    using Lanes = WidthLanes<kSigned>;
    const lbs::QuantWidths& w = t.widths;
    const Lanes open(w, kCoarse), coarse[3] = {Lanes(w, 0), Lanes(w, kCoarse > 1 ? 1 : 0), Lanes(w, kCoarse > 2 ? 2 : 0)};
    const Simd::F zero = Simd::fset(0.0f), high = Simd::fset(w.high * w.v), low = Simd::fset(-w.low * w.v);
    lbs::QuantSums total;
    Simd::F sum[3] = {zero, zero, zero};
    const auto one = [&](Simd::F x) {
        const Simd::F clipped = Simd::fmin(high, Simd::fmax(low, x));
        for (int j = 0; j < kCoarse; ++j) {
            const Simd::F error = Simd::fsub(clipped, coarse[j].value(x));
            sum[j] = Simd::fadd(sum[j], Simd::fmax(error, Simd::fsub(zero, error)));
        }
        return open.value(x);
    };
    fq_blocks(
        begin, end, [&](int64_t i) { fq_store<kBf16>(t.y, i, one(fq_load<kBf16>(t.x, i))); },
        [&](int64_t i, int64_t count) {  // the padding of the last vector is 0, whose error is 0 unless signed
            const Tail<kBf16> x(t.x, i, count);
            Tail<kBf16> y;
            fq_store<kBf16>(y.bytes, 0, one(fq_load<kBf16>(x.bytes, 0)));
            y.put(t.y, i, count);
            if constexpr (kSigned)
                for (int j = 0; j < kCoarse; ++j)
                    total.by_width[j] -= static_cast<double>(Simd::L - count) * static_cast<double>(w.step[j]);
        },
        [&] {
            for (int j = 0; j < kCoarse; ++j) {
                total.by_width[j] += static_cast<double>(Simd::fsum(sum[j]));
                sum[j] = zero;
            }
        });
    return total;
}

template <bool kBf16, bool kSigned, int kCoarse>
lbs::QuantSums fq_backward(const lbs::FakeQuantBackward& t, int64_t begin, int64_t end) {
    using Lanes = WidthLanes<kSigned>;
    const lbs::QuantWidths& w = t.widths;
    const Lanes open(w, kCoarse), coarse[3] = {Lanes(w, 0), Lanes(w, kCoarse > 1 ? 1 : 0), Lanes(w, kCoarse > 2 ? 2 : 0)};
    const Simd::F zero = Simd::fset(0.0f), high = Simd::fset(w.high * w.v), low = Simd::fset(-w.low * w.v);
    const Simd::F per_v = Simd::fset(1.0f / w.v), share_low = Simd::fset(w.low), share_high = Simd::fset(w.high);
    lbs::QuantSums total;
    Simd::F sum_v = zero, sum[3] = {zero, zero, zero};
    const auto one = [&](Simd::F x, Simd::F gy) {
        const Simd::F y = open.value(x);
        for (int j = 0; j < kCoarse; ++j)
            sum[j] = Simd::fadd(sum[j], Simd::fmul(gy, Simd::fsub(y, coarse[j].value(x))));
        const Simd::F gx = Simd::fkeep_inside(x, low, high, gy);
        const Simd::F slope = Simd::fmul(Simd::fkeep_inside(x, low, high, Simd::fsub(y, x)), per_v);
        const Simd::F edge = Simd::fsub(Simd::fmul(Simd::fkeep_above(x, high, gy), share_high),
                                        Simd::fmul(Simd::fkeep_above(low, x, gy), share_low));
        sum_v = Simd::fadd(sum_v, Simd::fadd(Simd::fmul(gx, slope), edge));
        return gx;
    };
    fq_blocks(
        begin, end,
        [&](int64_t i) { fq_store<kBf16>(t.gx, i, one(fq_load<kBf16>(t.x, i), fq_load<kBf16>(t.gy, i))); },
        [&](int64_t i, int64_t count) {  // gy is 0 in the padding
            const Tail<kBf16> x(t.x, i, count), gy(t.gy, i, count);
            Tail<kBf16> gx;
            fq_store<kBf16>(gx.bytes, 0, one(fq_load<kBf16>(x.bytes, 0), fq_load<kBf16>(gy.bytes, 0)));
            gx.put(t.gx, i, count);
        },
        [&] {
            total.v += static_cast<double>(Simd::fsum(sum_v));
            sum_v = zero;
            for (int j = 0; j < kCoarse; ++j) {
                total.by_width[j] += static_cast<double>(Simd::fsum(sum[j]));
                sum[j] = zero;
            }
        });
    return total;
}

// The run for a task's type, sign and number of coarse widths.
template <bool kBf16, bool kSigned, class Task>
lbs::QuantSums fq_by_coarse(const Task& t, int64_t begin, int64_t end) {
    constexpr bool kForward = std::is_same_v<Task, lbs::FakeQuantForward>;
    const auto run = [&](auto coarse) {
        if constexpr (kForward) return fq_forward<kBf16, kSigned, decltype(coarse)::value>(t, begin, end);
        else return fq_backward<kBf16, kSigned, decltype(coarse)::value>(t, begin, end);
    };
    switch (t.widths.coarse) {
        case 0: return run(std::integral_constant<int, 0>());
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        default: return run(std::integral_constant<int, 3>());
    }
}

template <class Task>
lbs::QuantSums fq_by_type(const Task& t, int64_t begin, int64_t end) {
    const bool is_signed = t.widths.is_signed;
    if (t.type == lbs::FloatType::kBfloat16)
        return is_signed ? fq_by_coarse<true, true>(t, begin, end) : fq_by_coarse<true, false>(t, begin, end);
    return is_signed ? fq_by_coarse<false, true>(t, begin, end) : fq_by_coarse<false, false>(t, begin, end);
}

lbs::QuantSums fake_quant_forward_kernel(const lbs::FakeQuantForward& t, int64_t begin, int64_t end) {
    return fq_by_type(t, begin, end);
}

lbs::QuantSums fake_quant_backward_kernel(const lbs::FakeQuantBackward& t, int64_t begin, int64_t end) {
    return fq_by_type(t, begin, end);
}

}  // namespace
