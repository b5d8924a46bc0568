// Vector type of the NEON kernels with dot products (asimddp): 8 lanes in two registers. The names are explained in
// simd_portable.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Simd {
    static constexpr int L = 8;
#if defined(__ARM_FEATURE_MATMUL_INT8)
    static constexpr double kDotCycles = 1;  // counted for two dots of registers a cycle, not measured
#else
    static constexpr double kDotCycles = 2;
#endif
    static constexpr int kSumVectors = 4;
    static constexpr int kShortVectors = 2;
    static constexpr bool kNarrowDot = false;

    struct I {
        int32x4_t v[2];
    };
    struct F {
        float32x4_t v[2];
    };

    template <class Op>
    static I make(const Op& op) {
        return {{op(0), op(1)}};
    }
    template <class Op>
    static F fmake(const Op& op) {
        return {{op(0), op(1)}};
    }
    template <class Op>
    static I make_bytes(const Op& op) {
        return make([&](int i) { return vreinterpretq_s32_u8(op(i)); });
    }
    static uint8x16_t bytes(int32x4_t a) { return vreinterpretq_u8_s32(a); }
    static uint32x4_t words(int32x4_t a) { return vreinterpretq_u32_s32(a); }

    static uint32x4_t lane_mask(uint32_t mask, int i) {  // bit 4 i + j -> lane j all ones
        const uint32x4_t bit = {1, 2, 4, 8};
        return vtstq_u32(vdupq_n_u32(mask >> (4 * i)), bit);
    }
    // Calls op(lane) for the lanes of a mask.
    template <class Op>
    static void for_lanes(uint32_t mask, const Op& op) {
        for (; mask; mask &= mask - 1) op(__builtin_ctz(mask));
    }

    static I izero() { return iset(0); }
    static I iload(const void* p) {
        return make_bytes([&](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
    }
    static void istore(void* p, I a) {
        for (int i = 0; i < 2; ++i) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, bytes(a.v[i]));
    }
    static I iload_mask(I old, uint32_t mask, const void* p) {
        int32_t lanes[L];
        istore(lanes, old);
        for_lanes(mask, [&](int i) { __builtin_memcpy(lanes + i, static_cast<const char*>(p) + 4 * i, 4); });
        return iload(lanes);
    }
    static void istore_mask(void* p, uint32_t mask, I a) {
        int32_t lanes[L];
        istore(lanes, a);
        for_lanes(mask, [&](int i) { __builtin_memcpy(static_cast<char*>(p) + 4 * i, lanes + i, 4); });
    }
    static void istore_compress(void* p, uint32_t mask, I a) {
        int32_t lanes[L];
        istore(lanes, a);
        char* out = static_cast<char*>(p);
        for_lanes(mask, [&](int i) {
            __builtin_memcpy(out, lanes + i, 4);
            out += 4;
        });
    }
    static void istore_apart(void* even, void* odd, I a) {
        vst1q_u8(static_cast<uint8_t*>(even), bytes(vuzp1q_s32(a.v[0], a.v[1])));
        vst1q_u8(static_cast<uint8_t*>(odd), bytes(vuzp2q_s32(a.v[0], a.v[1])));
    }
    static I igather(const void* p, const int32_t* offsets) {
        int32_t lanes[L];
        for (int i = 0; i < L; ++i) __builtin_memcpy(lanes + i, static_cast<const char*>(p) + offsets[i], 4);
        return iload(lanes);
    }
    static uint8x16_t byte_places(int32x4_t lanes) {  // of the four bytes of lanes below 16
        return bytes(vmlaq_s32(vdupq_n_s32(0x03020100), lanes, vdupq_n_s32(0x04040404)));
    }
    static I ipermute(I a, I lanes) {
        const uint8x16x2_t table = {{bytes(a.v[0]), bytes(a.v[1])}};
        return make_bytes([&](int i) { return vqtbl2q_u8(table, byte_places(lanes.v[i])); });
    }
    static I ipick(I a, I b, I index) {
        const uint8x16x4_t table = {{bytes(a.v[0]), bytes(a.v[1]), bytes(b.v[0]), bytes(b.v[1])}};
        const int32x4_t all = vdupq_n_s32(2 * L - 1);
        return make_bytes([&](int i) { return vqtbl4q_u8(table, byte_places(vandq_s32(index.v[i], all))); });
    }
    static I ibroadcast(const void* p) {
        int32_t value;
        __builtin_memcpy(&value, p, 4);
        return iset(value);
    }
    static I iset(int32_t value) {
        return make([&](int) { return vdupq_n_s32(value); });
    }
    static I iadd(I a, I b) {
        return make([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
    }
    static I isub(I a, I b) {
        return make([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
    }
    static void settle(I&) {}
    static I iquarters(const void* p) {
        return make_bytes([&](int) { return vld1q_u8(static_cast<const uint8_t*>(p)); });
    }
    static I ishl(I a, int count) {
        return make([&](int i) { return vshlq_s32(a.v[i], vdupq_n_s32(count)); });
    }
    static I isar(I a, int count) { return ishl(a, -count); }  // a shift to the left by fewer than none
    static I ipack4(I q0, I q1, I q2, I q3) {
        return make([&](int i) {
            return vsliq_n_s32(vsliq_n_s32(vsliq_n_s32(q0.v[i], q1.v[i], 8), q2.v[i], 16), q3.v[i], 24);
        });
    }
    static I ibytes_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        return make_bytes([&](int i) {
            const int16x8_t first = vcombine_s16(vqmovn_s32(q0.v[i]), vqmovn_s32(q1.v[i]));
            const int16x8_t second = vcombine_s16(vqmovn_s32(q2.v[i]), vqmovn_s32(q3.v[i]));
            const uint8x16_t codes = vcombine_u8(vqmovun_s16(first), vqmovun_s16(second));
            return vminq_u8(vmaxq_u8(codes, bytes(low.v[i])), bytes(high.v[i]));
        });
    }
    static I ipack4_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        constexpr uint8_t kPixels[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        const I together = ibytes_clamped(q0, q1, q2, q3, low, high);
        // Four pixels of a channel lie together, and become four channels of a pixel.
        return make_bytes([&](int i) { return vqtbl1q_u8(bytes(together.v[i]), vld1q_u8(kPixels)); });
    }
    static I ibytes_of(I a, int i) {
        constexpr uint8_t kFirst[16] = {0, 255, 255, 255, 1, 255, 255, 255, 2, 255, 255, 255, 3, 255, 255, 255};
        const uint8x16_t more = vreinterpretq_u8_u32(vdupq_n_u32(static_cast<uint32_t>(4 * i)));
        return make_bytes([&](int k) { return vqtbl1q_u8(bytes(a.v[k]), vorrq_u8(vld1q_u8(kFirst), more)); });
    }
    static I iload_quarters(const unsigned char* p, int64_t pitch) {
        return make_bytes([&](int i) { return vld1q_u8(p + i * pitch); });
    }
    static void istore_quarters(unsigned char* p, int64_t pitch, int lanes, I a) {
        for (int i = 0; i < 2; ++i) std::memcpy(p + i * pitch, &a.v[i], 4 * static_cast<size_t>(lanes));
    }
    static I iscale_bytes(I x, int least, int most, int factor, int offset, int shift) {
        const uint16x8_t times = vdupq_n_u16(static_cast<uint16_t>(factor));
        const uint16x8_t plus = vdupq_n_u16(static_cast<uint16_t>(offset));
        const int16x8_t by = vdupq_n_s16(static_cast<int16_t>(-shift));
        return make_bytes([&](int i) {
            const uint8x16_t beyond = vqsubq_u8(bytes(x.v[i]), vdupq_n_u8(static_cast<uint8_t>(least)));
            const uint8x16_t q = vminq_u8(beyond, vdupq_n_u8(static_cast<uint8_t>(most - least)));
            const uint16x8_t low = vshlq_u16(vmlaq_u16(plus, vmovl_u8(vget_low_u8(q)), times), by);
            const uint16x8_t high = vshlq_u16(vmlaq_u16(plus, vmovl_u8(vget_high_u8(q)), times), by);
            return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
        });
    }
    static I ibytes(const uint8_t* p) {
        const uint16x8_t wide = vmovl_u8(vld1_u8(p));
        return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(wide)))}};
    }
    static I ibyte(I a, int j) {
        return make([&](int i) {
            const uint32x4_t low = vshlq_u32(words(a.v[i]), vdupq_n_s32(-8 * j));
            return vreinterpretq_s32_u32(vandq_u32(low, vdupq_n_u32(255)));
        });
    }
    static I iset_bytes(int value) {
        return make_bytes([&](int) { return vdupq_n_u8(static_cast<uint8_t>(value)); });
    }
    static I iadd_bytes(I a, I b) {
        return make_bytes([&](int i) { return vaddq_u8(bytes(a.v[i]), bytes(b.v[i])); });
    }
    static I isub_bytes(I a, I b) {
        return make_bytes([&](int i) { return vsubq_u8(bytes(a.v[i]), bytes(b.v[i])); });
    }
    static I max_bytes(I a, I b) {
        return make_bytes([&](int i) { return vmaxq_u8(bytes(a.v[i]), bytes(b.v[i])); });
    }
    static I imerge(I old, uint32_t mask, I a) {
        return make([&](int i) { return vbslq_s32(lane_mask(mask, i), a.v[i], old.v[i]); });
    }
    static void transpose_bytes(I (&x)[4]) {
        for (int i = 0; i < 2; ++i) {
            const auto pair = [&](int k) { return vtrnq_u8(bytes(x[k].v[i]), bytes(x[k + 1].v[i])); };
            const uint8x16x2_t low = pair(0), high = pair(2);  // bytes 0 and 2, 1 and 3, of two vectors
            for (int j = 0; j < 2; ++j) {
                const uint16x8x2_t four =
                    vtrnq_u16(vreinterpretq_u16_u8(low.val[j]), vreinterpretq_u16_u8(high.val[j]));
                x[j].v[i] = vreinterpretq_s32_u16(four.val[0]);
                x[j + 2].v[i] = vreinterpretq_s32_u16(four.val[1]);
            }
        }
    }
    static void interleave_bytes(I (&x)[4]) {
        for (int i = 0; i < 2; ++i) {
            const auto pair = [&](int k) { return vzipq_u8(bytes(x[k].v[i]), bytes(x[k + 1].v[i])); };
            const uint8x16x2_t first = pair(0), second = pair(2);
            for (int j = 0; j < 2; ++j) {
                const uint16x8x2_t four =
                    vzipq_u16(vreinterpretq_u16_u8(first.val[j]), vreinterpretq_u16_u8(second.val[j]));
                x[2 * j].v[i] = vreinterpretq_s32_u16(four.val[0]);
                x[2 * j + 1].v[i] = vreinterpretq_s32_u16(four.val[1]);
            }
        }
    }
#if defined(__ARM_FEATURE_MATMUL_INT8)
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        return make([&](int i) { return vusdotq_s32(acc.v[i], bytes(a.v[i]), vreinterpretq_s8_s32(w.v[i])); });
    }
#else
    // Both operands are unsigned or both signed: a . w = a . (w + 128) - a . 128. Codes meet several filters, so that
    // the second product is made once for all of them.
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        const uint8x16_t top = vdupq_n_u8(128);
        return make([&](int i) {
            const uint32x4_t above = vdotq_u32(vdupq_n_u32(0), bytes(a.v[i]), top);
            const uint32x4_t sum = vdotq_u32(words(acc.v[i]), bytes(a.v[i]), veorq_u8(bytes(w.v[i]), top));
            return vreinterpretq_s32_u32(vsubq_u32(sum, above));
        });
    }
#endif

    static F fset(float value) {
        return fmake([&](int) { return vdupq_n_f32(value); });
    }
    static F fload(const float* p) {
        return fmake([&](int i) { return vld1q_f32(p + 4 * i); });
    }
    static F fload_mask(const float* p, uint32_t mask) { return fbits(iload_mask(izero(), mask, p)); }
    static F fload_even(const float* p) {
        return fmake([&](int i) { return vld2q_f32(p + 8 * i).val[0]; });
    }
    static void fstore(float* p, F a) {
        for (int i = 0; i < 2; ++i) vst1q_f32(p + 4 * i, a.v[i]);
    }
    static void fstore_mask(float* p, uint32_t mask, F a) { istore_mask(p, mask, ibits(a)); }
    static F fload_quarters(const float* p, int64_t pitch, int lanes) {
        return fmake([&](int i) {
            float four[4] = {};
            std::memcpy(four, p + i * pitch, 4 * static_cast<size_t>(lanes));
            return vld1q_f32(four);
        });
    }
    static void fstore_quarters(float* p, int64_t pitch, int lanes, F a) {
        for (int i = 0; i < 2; ++i) std::memcpy(p + i * pitch, &a.v[i], 4 * static_cast<size_t>(lanes));
    }
    static void ftranspose(F (&x)[4]) {
        for (int i = 0; i < 2; ++i) {
            const float32x4_t low01 = vzip1q_f32(x[0].v[i], x[1].v[i]), high01 = vzip2q_f32(x[0].v[i], x[1].v[i]);
            const float32x4_t low23 = vzip1q_f32(x[2].v[i], x[3].v[i]), high23 = vzip2q_f32(x[2].v[i], x[3].v[i]);
            x[0].v[i] = vcombine_f32(vget_low_f32(low01), vget_low_f32(low23));
            x[1].v[i] = vcombine_f32(vget_high_f32(low01), vget_high_f32(low23));
            x[2].v[i] = vcombine_f32(vget_low_f32(high01), vget_low_f32(high23));
            x[3].v[i] = vcombine_f32(vget_high_f32(high01), vget_high_f32(high23));
        }
    }
    static F fcvt(I a) {
        return fmake([&](int i) { return vcvtq_f32_s32(a.v[i]); });
    }
    static F ffma(F a, F b, F c) {
        return fmake([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
    }
    static F fadd(F a, F b) {
        return fmake([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
    }
    static F fsub(F a, F b) {
        return fmake([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
    }
    static F fmul(F a, F b) {
        return fmake([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
    }
    static F fdiv(F a, F b) {
        return fmake([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
    }
    static F fbits(I a) {
        return fmake([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
    }
    static I ibits(F a) {
        return make([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
    }
    // By comparison: fmax and fmin of NEON return what is not a number, and tell zeros apart.
    static F fmax(F a, F b) {
        return fmake([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static F fmin(F a, F b) {
        return fmake([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static F flarger(F best, F value) {
        return fmake([&](int i) {
            const uint32x4_t keep =
                vandq_u32(vceqq_f32(value.v[i], value.v[i]), vmvnq_u32(vcgtq_f32(value.v[i], best.v[i])));
            return vbslq_f32(keep, best.v[i], value.v[i]);
        });
    }
    static F fround(F a) {
        return fmake([&](int i) { return vrndnq_f32(a.v[i]); });
    }
    static I ifromf(F a) {
        return make([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
    }
    static float32x4_t keep(uint32x4_t mask, float32x4_t a) {
        return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a)));
    }
    static F fkeep_inside(F x, F low, F high, F a) {
        return fmake(
            [&](int i) { return keep(vandq_u32(vcgeq_f32(x.v[i], low.v[i]), vcleq_f32(x.v[i], high.v[i])), a.v[i]); });
    }
    static F fkeep_above(F x, F high, F a) {
        return fmake([&](int i) { return keep(vcgtq_f32(x.v[i], high.v[i]), a.v[i]); });
    }
    static float fsum(F a) {
        float lanes[L], total = 0.0f;
        fstore(lanes, a);
        for (float lane : lanes) total += lane;
        return total;
    }

    static F fload_bf16(const uint16_t* p) {
        const uint16x8_t half = vld1q_u16(p);
        return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)),
                 vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))}};
    }
    static uint32x4_t bf16_bits(float32x4_t a) {  // in the low half of each lane
        const uint32x4_t bits = vreinterpretq_u32_f32(a);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        return vbslq_u32(vceqq_f32(a, a), vshrq_n_u32(sum, 16), vdupq_n_u32(0x7fc0));
    }
    static void fstore_bf16(uint16_t* p, F a) {
        vst1q_u16(p, vcombine_u16(vmovn_u32(bf16_bits(a.v[0])), vmovn_u32(bf16_bits(a.v[1]))));
    }
    static F fround_bf16(F a) {
        return fmake([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(bf16_bits(a.v[i]), 16)); });
    }
    static F fround_f16(F a) {
        return fmake([&](int i) { return vcvt_f32_f16(vcvt_f16_f32(a.v[i])); });
    }
};

}  // namespace
