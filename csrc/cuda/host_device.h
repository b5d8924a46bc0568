// What lets one header be compiled for the GPU and for the processor, where a model of the GPU runs it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define LBS_HD __host__ __device__ __forceinline__
#define LBS_UNROLL _Pragma("unroll")
#define LBS_UNROLL_2 _Pragma("unroll 2")
#define LBS_NO_UNROLL _Pragma("unroll 1")
#else
#define LBS_HD inline
#define LBS_UNROLL
#define LBS_UNROLL_2
#define LBS_NO_UNROLL
#endif

namespace lbs::gpu {

struct alignas(16) Words4 {
    uint32_t v[4];
};
struct alignas(16) Floats4 {
    float v[4];
};
struct alignas(16) Ints4 {
    int v[4];
};

// Division of 0 <= n < 2^31 by a fixed d: (mulhi(n, magic) + n) >> shift, magic = floor(2^32 (2^shift - d) / d) + 1,
// shift = ceil(log2 d). The GPU has no integer division.
struct FastDivisor {
    uint32_t divisor, magic, shift;
};

inline FastDivisor fast_divisor(int divisor) {
    uint32_t shift = 0;
    while ((1ull << shift) < static_cast<uint64_t>(divisor)) ++shift;
    const uint64_t gap = (1ull << shift) - static_cast<uint64_t>(divisor);
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((gap << 32) / static_cast<uint64_t>(divisor) + 1),
            shift};
}

LBS_HD int quotient(int n, const FastDivisor& d) {
    const uint32_t value = static_cast<uint32_t>(n);
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(value, d.magic);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(value) * d.magic) >> 32);
#endif
    return static_cast<int>((high + value) >> d.shift);
}

LBS_HD int remainder(int n, int quotient, const FastDivisor& d) { return n - quotient * static_cast<int>(d.divisor); }

LBS_HD int popcount(uint32_t value) {
#if defined(__CUDA_ARCH__)
    return __popc(value);
#else
    return __builtin_popcount(value);
#endif
}

// float32(a * b + c), rounded once.
LBS_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

LBS_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

LBS_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// bfloat16 of a float, half to even on the bit pattern; a NaN keeps its upper half and is made quiet.
LBS_HD uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : bits >> 16 | 0x40u);
}

LBS_HD float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// float16 of a float, half to even. On the processor by hand: its compilers need not know the type.
LBS_HD uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // not a number
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // below 2^-14: an integer number of 2^-24, rounded by the addition of 0.5
        return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
#endif
}

LBS_HD float from_float16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest < 0x400u) return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));
    return bits_float(sign | ((rest << 13) + 0x38000000u));
#endif
}

}  // namespace lbs::gpu
