// Vector type of the portable kernels: 16 lanes in plain arrays, for the compiler to vectorise as it can.
// Every simd_*.h offers the same names, so that a kernel is written once. Anonymous namespace: each instruction set has
// its own translation unit, and none of its code may be shared by the linker with another one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
    static constexpr int L = 16;               // lanes: 32-bit integers, floats, or groups of four code bytes
    static constexpr double kDotCycles = 8;    // of `dot`, where nothing else limits; on a Zen 5
    static constexpr int kSumVectors = 1;      // summed together
    static constexpr int kShortVectors = 1;    // of four filters each, where sums are short
    static constexpr bool kNarrowDot = false;  // true where dot<false> takes pairs of products of at most 16 bits only

    struct I {
        int32_t v[L];
    };
    struct F {
        float v[L];
    };
    using Int = int32_t __attribute__((vector_size(4 * L)));
    using Bytes = uint8_t __attribute__((vector_size(4 * L)));
    using Short = int16_t __attribute__((vector_size(4 * L)));
    using Unsigned = uint16_t __attribute__((vector_size(4 * L)));

    static I izero() {
        I r;
        for (int i = 0; i < L; ++i) r.v[i] = 0;
        return r;
    }
    static I iload(const void* p) {
        I r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void istore(void* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
    // Lanes of `mask` from p[lane], the others from `old`; memory of other lanes is not touched.
    static I iload_mask(I old, uint32_t mask, const void* p) {
        const char* bytes = static_cast<const char*>(p);
        for (int i = 0; i < L; ++i)
            if (mask >> i & 1) std::memcpy(&old.v[i], bytes + 4 * i, 4);
        return old;
    }
    static void istore_mask(void* p, uint32_t mask, I a) {
        char* bytes = static_cast<char*>(p);
        for (int i = 0; i < L; ++i)
            if (mask >> i & 1) std::memcpy(bytes + 4 * i, &a.v[i], 4);
    }
    // Lanes of `mask` moved together to the low lanes, then the first popcount(mask) stored.
    static void istore_compress(void* p, uint32_t mask, I a) {
        char* bytes = static_cast<char*>(p);
        for (int i = 0; i < L; ++i)
            if (mask >> i & 1) {
                std::memcpy(bytes, &a.v[i], 4);
                bytes += 4;
            }
    }
    static void istore_apart(void* even, void* odd, I a) {  // the lanes of even and of odd number
        for (int i = 0; i < L; ++i) std::memcpy(static_cast<char*>(i % 2 ? odd : even) + i / 2 * 4, &a.v[i], 4);
    }
    static I igather(const void* p, const int32_t* offsets) {
        I r;
        for (int i = 0; i < L; ++i) std::memcpy(&r.v[i], static_cast<const char*>(p) + offsets[i], 4);
        return r;
    }
    static I ipermute(I a, I lanes) {  // lane lanes[i] of a
        I r;
        for (int i = 0; i < L; ++i) r.v[i] = a.v[lanes.v[i]];
        return r;
    }
    static I ibroadcast(const void* p) {
        int32_t value;
        std::memcpy(&value, p, 4);
        return iset(value);
    }
    static I iset(int32_t value) {
        I r;
        for (int i = 0; i < L; ++i) r.v[i] = value;
        return r;
    }
    static I iadd(I a, I b) {
        for (int i = 0; i < L; ++i)
            a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
        return a;
    }
    // What a loop has summed, in registers: GCC 12 else moves every sum twice in each step of a loop that calls follow.
    static void settle(I&) {}
    // Four lanes, again and again
    static I iquarters(const void* p) {
        I r;
        for (int i = 0; i < L; i += 4) std::memcpy(&r.v[i], p, 16);
        return r;
    }
    static I ishl(I a, int count) {
        for (int i = 0; i < L; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << count);
        return a;
    }
    // q0 | q1 << 8 | q2 << 16 | q3 << 24 for codes 0..255
    static I ipack4(I q0, I q1, I q2, I q3) {
        for (int i = 0; i < L; ++i)
            q0.v[i] = static_cast<int32_t>(static_cast<uint32_t>(q0.v[i]) | static_cast<uint32_t>(q1.v[i]) << 8 |
                                           static_cast<uint32_t>(q2.v[i]) << 16 | static_cast<uint32_t>(q3.v[i]) << 24);
        return q0;
    }
    // The same of any integers, clamped to the bytes of low and high, low <= high
    static I ipack4_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        const int32_t least = low.v[0] & 255, most = high.v[0] & 255;
        I q[4] = {q0, q1, q2, q3};
        for (I& one : q)
            for (int i = 0; i < L; ++i) one.v[i] = one.v[i] < least ? least : one.v[i] > most ? most : one.v[i];
        return ipack4(q[0], q[1], q[2], q[3]);
    }
    // The same, clamped likewise, but of four lanes: their bytes of q0, then of q1, q2 and q3
    static I ibytes_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        const int32_t least = low.v[0] & 255, most = high.v[0] & 255;
        const I q[4] = {q0, q1, q2, q3};
        I r;
        for (int i = 0; i < L; ++i) {
            uint8_t four[4];
            for (int j = 0; j < 4; ++j) {
                const int32_t x = q[i % 4].v[i / 4 * 4 + j];
                four[j] = static_cast<uint8_t>(x < least ? least : x > most ? most : x);
            }
            std::memcpy(&r.v[i], four, 4);
        }
        return r;
    }
    // Of every four lanes the bytes of lane i, one a lane
    static I ibytes_of(I a, int i) {
        I r;
        for (int k = 0; k < L; ++k)
            r.v[k] = static_cast<int32_t>(static_cast<uint32_t>(a.v[k / 4 * 4 + i]) >> (8 * (k % 4)) & 255u);
        return r;
    }
    // Four lanes each from p, p + pitch, ...; of those the first `lanes`
    static I iload_quarters(const unsigned char* p, int64_t pitch) {
        I r;
        for (int i = 0; i < L / 4; ++i) std::memcpy(&r.v[4 * i], p + i * pitch, 16);
        return r;
    }
    static void istore_quarters(unsigned char* p, int64_t pitch, int lanes, I a) {
        for (int i = 0; i < L / 4; ++i) std::memcpy(p + i * pitch, &a.v[4 * i], 4 * static_cast<size_t>(lanes));
    }
    // Of bytes: ((x, from least to most, - least) * factor + offset) >> shift; sums fit 16 bits, results a byte
    static I iscale_bytes(I x, int least, int most, int factor, int offset, int shift) {
        uint8_t bytes[4 * L];
        std::memcpy(bytes, x.v, sizeof bytes);
        for (uint8_t& q : bytes) {
            const int inside = q < least ? least : q < most ? q : most;
            q = static_cast<uint8_t>(((inside - least) * factor + offset) >> shift);
        }
        std::memcpy(x.v, bytes, sizeof bytes);
        return x;
    }
    // p[0 .. L - 1] as integers
    static I ibytes(const uint8_t* p) {
        I r;
        for (int i = 0; i < L; ++i) r.v[i] = p[i];
        return r;
    }
    static I ibyte(I a, int j) {  // byte j of each lane
        for (int i = 0; i < L; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> (8 * j) & 255u);
        return a;
    }
    static I iset_bytes(int value) {
        I r;
        std::memset(r.v, value, sizeof r.v);
        return r;
    }
    static I iadd_bytes(I a, I b) {  // modulo 256
        Bytes x, y;
        std::memcpy(&x, a.v, sizeof x);
        std::memcpy(&y, b.v, sizeof y);
        x += y;
        std::memcpy(a.v, &x, sizeof x);
        return a;
    }
    static I isub_bytes(I a, I b) {
        Bytes x, y;
        std::memcpy(&x, a.v, sizeof x);
        std::memcpy(&y, b.v, sizeof y);
        x -= y;
        std::memcpy(a.v, &x, sizeof x);
        return a;
    }
    static I isub(I a, I b) {
        for (int i = 0; i < L; ++i)
            a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i]));
        return a;
    }
    static I isar(I a, int count) {  // towards minus infinity
        for (int i = 0; i < L; ++i) a.v[i] >>= count;
        return a;
    }
    static I imerge(I old, uint32_t mask, I a) {  // lanes of `mask` from a
        for (int i = 0; i < L; ++i) old.v[i] = mask >> i & 1 ? a.v[i] : old.v[i];
        return old;
    }
    static I ipick(I a, I b, I index) {  // lane i: lane index[i], modulo 2 L, of a followed by b
        I r;
        for (int i = 0; i < L; ++i) {
            const int lane = index.v[i] & (2 * L - 1);
            r.v[i] = lane < L ? a.v[lane] : b.v[lane - L];
        }
        return r;
    }
    static void transpose_bytes(I (&x)[4]) {  // byte j of lane i of x[k] becomes byte k of lane i of x[j]
        uint8_t in[4][4 * L], out[4][4 * L];
        std::memcpy(in, x, sizeof in);
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < L; ++i)
                for (int k = 0; k < 4; ++k) out[j][4 * i + k] = in[k][4 * i + j];
        std::memcpy(x, out, sizeof out);
    }
    // Of every four lanes: byte j of lane i of x[k] becomes byte k of lane j of x[i].
    static void interleave_bytes(I (&x)[4]) {
        uint8_t in[4][4 * L], out[4][4 * L];
        std::memcpy(in, x, sizeof in);
        for (int four = 0; four < 4 * L; four += 16)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    for (int k = 0; k < 4; ++k) out[i][four + 4 * j + k] = in[k][four + 4 * i + j];
        std::memcpy(x, out, sizeof out);
    }
    static I max_bytes(I a, I b) {
        uint8_t x[4 * L], y[4 * L];
        std::memcpy(x, a.v, sizeof x);
        std::memcpy(y, b.v, sizeof y);
        for (int i = 0; i < 4 * L; ++i) x[i] = x[i] > y[i] ? x[i] : y[i];
        std::memcpy(a.v, x, sizeof x);
        return a;
    }
    // acc + sum of four products: unsigned bytes of a, signed bytes of w. In 16-bit lanes, whose multiply every vector
    // unit has (a product of a code and a weight just fits), written with the vector types of GCC and Clang because
    // neither finds this by itself (14 ms -> 3 ms for a CIFAR ResNet-20 with SSE2).
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        Short x, y;
        std::memcpy(&x, a.v, sizeof x);
        std::memcpy(&y, w.v, sizeof y);
        const Int even = (Int)((x & 255) * (y << 8 >> 8)), odd = (Int)((Short)((Unsigned)x >> 8) * (y >> 8));
        Int sum;
        std::memcpy(&sum, acc.v, sizeof sum);
        sum += (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
        std::memcpy(acc.v, &sum, sizeof sum);
        return acc;
    }

    static F fset(float value) {
        F r;
        for (int i = 0; i < L; ++i) r.v[i] = value;
        return r;
    }
    static F fload(const float* p) {
        F r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static F fload_mask(const float* p, uint32_t mask) {
        F r = fset(0.0f);
        for (int i = 0; i < L; ++i)
            if (mask >> i & 1) r.v[i] = p[i];
        return r;
    }
    static F fload_even(const float* p) {  // p[0], p[2], ...
        F r;
        for (int i = 0; i < L; ++i) r.v[i] = p[2 * i];
        return r;
    }
    static void fstore(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
    static void fstore_mask(float* p, uint32_t mask, F a) {
        for (int i = 0; i < L; ++i)
            if (mask >> i & 1) p[i] = a.v[i];
    }
    // The first `lanes` each, the others zero; pitches are of floats
    static F fload_quarters(const float* p, int64_t pitch, int lanes) {
        F r{};
        for (int i = 0; i < L / 4; ++i) std::memcpy(&r.v[4 * i], p + i * pitch, 4 * static_cast<size_t>(lanes));
        return r;
    }
    static void fstore_quarters(float* p, int64_t pitch, int lanes, F a) {
        for (int i = 0; i < L / 4; ++i) std::memcpy(p + i * pitch, &a.v[4 * i], 4 * static_cast<size_t>(lanes));
    }
    // Of every four lanes: lane i of vector j becomes lane j of vector i
    static void ftranspose(F (&x)[4]) {
        const F old[4] = {x[0], x[1], x[2], x[3]};
        for (int k = 0; k < L; ++k)
            for (int j = 0; j < 4; ++j) x[j].v[k] = old[k % 4].v[k / 4 * 4 + j];
    }
    static F fcvt(I a) {
        F r;
        for (int i = 0; i < L; ++i) r.v[i] = static_cast<float>(a.v[i]);
        return r;
    }
    static F ffma(F a, F b, F c) {
        for (int i = 0; i < L; ++i) a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
        return a;
    }
    static F fadd(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] += b.v[i];
        return a;
    }
    static F fsub(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] -= b.v[i];
        return a;
    }
    static F fmul(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] *= b.v[i];
        return a;
    }
    static F fdiv(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] /= b.v[i];
        return a;
    }
    static F fbits(I a) {  // the floats of these bit patterns
        F r;
        std::memcpy(r.v, a.v, sizeof r.v);
        return r;
    }
    // max and min return b where either operand is not a number, and where both are zero: the rule of maxps and minps.
    static F fmax(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    static F fmin(F a, F b) {
        for (int i = 0; i < L; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
        return a;
    }
    // The larger one, of equals the best; not a number wins.
    static F flarger(F best, F value) {
        for (int i = 0; i < L; ++i)
            best.v[i] = value.v[i] > best.v[i] || value.v[i] != value.v[i] ? value.v[i] : best.v[i];
        return best;
    }
    // Round half to even; exact for |a| < 2^22, which every caller ensures by clamping first.
    static F fround(F a) {
        for (int i = 0; i < L; ++i) {
            const float big = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits
            const float sum = a.v[i] + big;
            a.v[i] = sum - big;
        }
        return a;
    }
    static I ifromf(F a) {  // round half to even; |a| < 2^22
        I r;
        a = fround(a);
        for (int i = 0; i < L; ++i) r.v[i] = static_cast<int32_t>(a.v[i]);
        return r;
    }
    // a where low <= x <= high, otherwise 0
    static F fkeep_inside(F x, F low, F high, F a) {
        for (int i = 0; i < L; ++i) a.v[i] = (x.v[i] >= low.v[i] && x.v[i] <= high.v[i]) ? a.v[i] : 0.0f;
        return a;
    }
    // a where x > high, otherwise 0
    static F fkeep_above(F x, F high, F a) {
        for (int i = 0; i < L; ++i) a.v[i] = x.v[i] > high.v[i] ? a.v[i] : 0.0f;
        return a;
    }
    static float fsum(F a) {
        float total = 0.0f;
        for (int i = 0; i < L; ++i) total += a.v[i];
        return total;
    }

    static F fload_bf16(const uint16_t* p) {
        F r;
        for (int i = 0; i < L; ++i) {
            const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
            std::memcpy(&r.v[i], &bits, 4);
        }
        return r;
    }
    static void fstore_bf16(uint16_t* p, F a) {
        for (int i = 0; i < L; ++i) p[i] = bf16_bits(a.v[i]);
    }
    static F fround_bf16(F a) {
        for (int i = 0; i < L; ++i) {
            const uint32_t bits = static_cast<uint32_t>(bf16_bits(a.v[i])) << 16;
            std::memcpy(&a.v[i], &bits, 4);
        }
        return a;
    }
    static F fround_f16(F a) {
        for (int i = 0; i < L; ++i) a.v[i] = f16_round(a.v[i]);
        return a;
    }

    static uint16_t bf16_bits(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
        return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    // The nearest binary16 value, half to even, as a float: scaled so that one float32 addition does the rounding.
    static float f16_round(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint32_t sign = bits & 0x80000000u;
        bits ^= sign;
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        float result;
        if (!(magnitude < 65520.0f)) {
            result = magnitude > 0.0f ? INFINITY : magnitude;  // the second case is not a number
        } else if (magnitude < 6.103515625e-05f) {             // 2^-14: subnormal, steps of 2^-24
            result = (magnitude + 0.5f) - 0.5f;
        } else {
            uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1);
            rounded &= ~0x1fffu;
            std::memcpy(&result, &rounded, 4);
        }
        uint32_t out;
        std::memcpy(&out, &result, 4);
        out |= sign;
        std::memcpy(&result, &out, 4);
        return result;
    }
};

}  // namespace
