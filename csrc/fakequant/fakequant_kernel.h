// Kernels of fakequant.h over the Simd type of the translation unit.
#pragma once

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

template <bool kBf16>
void fq_forward(const lbs::FakeQuantForward& t, int64_t begin, int64_t end) {
    const Simd::F scale = Simd::fset(t.scale), step = Simd::fset(t.step), n = Simd::fset(t.n), low = Simd::fset(t.low);
    // Bounds first: the kernels' max and min return their second operand for not-a-number, which lets it through;
    // rounding after clamping is the same, the bounds being integers.
    const auto one = [&](Simd::F x) {
        return Simd::fmul(Simd::fround(Simd::fmin(n, Simd::fmax(low, Simd::fmul(x, scale)))), step);
    };
    int64_t i = begin;
    for (; i + Simd::L <= end; i += Simd::L) fq_store<kBf16>(t.y, i, one(fq_load<kBf16>(t.x, i)));
    if (i < end) {
        const Tail<kBf16> x(t.x, i, end - i);
        Tail<kBf16> y;
        fq_store<kBf16>(y.bytes, 0, one(fq_load<kBf16>(x.bytes, 0)));
        y.put(t.y, i, end - i);
    }
}

template <bool kBf16>
double fq_backward(const lbs::FakeQuantBackward& t, int64_t begin, int64_t end) {
    const Simd::F zero = Simd::fset(0.0f), v = Simd::fset(t.v), scale = Simd::fset(t.scale);
    const Simd::F per_n = Simd::fset(1.0f / t.n), per_v = Simd::fset(1.0f / t.v);
    Simd::F sum = zero;
    const auto one = [&](Simd::F x, Simd::F gy) {
        const Simd::F gx = Simd::fkeep_inside(x, zero, v, gy);
        const Simd::F inside = Simd::fkeep_inside(x, zero, v, x);  // bounded, so that rounding is exact
        const Simd::F q = Simd::fround(Simd::fmul(inside, scale));
        const Simd::F slope = Simd::fsub(Simd::fmul(q, per_n), Simd::fmul(inside, per_v));
        sum = Simd::fadd(sum, Simd::fadd(Simd::fmul(gx, slope), Simd::fkeep_above(x, v, gy)));
        return gx;
    };
    double total = 0.0;
    int64_t i = begin;
    while (i + Simd::L <= end) {
        const int64_t stop = i + kSumBlock < end ? i + kSumBlock : end;
        for (; i + Simd::L <= stop; i += Simd::L)
            fq_store<kBf16>(t.gx, i, one(fq_load<kBf16>(t.x, i), fq_load<kBf16>(t.gy, i)));
        total += static_cast<double>(Simd::fsum(sum));
        sum = zero;
    }
    if (i < end) {
        const Tail<kBf16> x(t.x, i, end - i), gy(t.gy, i, end - i);
        Tail<kBf16> gx;
        fq_store<kBf16>(gx.bytes, 0, one(fq_load<kBf16>(x.bytes, 0), fq_load<kBf16>(gy.bytes, 0)));
        gx.put(t.gx, i, end - i);
        total += static_cast<double>(Simd::fsum(sum));
    }
    return total;
}

void fake_quant_forward_kernel(const lbs::FakeQuantForward& t, int64_t begin, int64_t end) {
    if (t.type == lbs::FloatType::kBfloat16) fq_forward<true>(t, begin, end);
    else fq_forward<false>(t, begin, end);
}

double fake_quant_backward_kernel(const lbs::FakeQuantBackward& t, int64_t begin, int64_t end) {
    if (t.type == lbs::FloatType::kBfloat16) return fq_backward<true>(t, begin, end);
    return fq_backward<false>(t, begin, end);
}

}  // namespace
