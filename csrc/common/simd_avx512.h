// Vector type of the AVX-512 VNNI kernels: 16 lanes. The names are explained in simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int L = 16;
    static constexpr double kDotCycles = 0.5;
    static constexpr int kSumVectors = 6;
    static constexpr int kShortVectors = 4;
    static constexpr bool kNarrowDot = false;

    using I = __m512i;
    using F = __m512;

    static I izero() { return _mm512_setzero_si512(); }
    static I iload(const void* p) { return _mm512_loadu_si512(p); }
    static void istore(void* p, I a) { _mm512_storeu_si512(p, a); }
    static I iload_mask(I old, uint32_t mask, const void* p) {
        return _mm512_mask_loadu_epi32(old, static_cast<__mmask16>(mask), p);
    }
    static void istore_mask(void* p, uint32_t mask, I a) {
        _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(mask), a);
    }
    static void istore_compress(void* p, uint32_t mask, I a) {
        // The register form and a masked store: compressing straight into memory is microcoded on Zen.
        const I low = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), a);
        const uint32_t count = static_cast<uint32_t>(__builtin_popcount(mask));
        _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << count) - 1u), low);
    }
    static void istore_apart(void* even, void* odd, I a) {
        const I lanes =
            _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), a);
        _mm256_storeu_si256(static_cast<__m256i*>(even), _mm512_castsi512_si256(lanes));
        _mm256_storeu_si256(static_cast<__m256i*>(odd), _mm512_extracti64x4_epi64(lanes, 1));
    }
    static I igather(const void* p, const int32_t* offsets) {
        return _mm512_i32gather_epi32(_mm512_loadu_si512(offsets), p, 1);
    }
    static I ipermute(I a, I lanes) { return _mm512_permutexvar_epi32(lanes, a); }
    static I ibroadcast(const void* p) {
        int32_t value;
        __builtin_memcpy(&value, p, 4);
        return _mm512_set1_epi32(value);
    }
    static I iset(int32_t value) { return _mm512_set1_epi32(value); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static void settle(I& a) { __asm__("" : "+v"(a)); }
    static I iquarters(const void* p) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static I ishl(I a, int count) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count)); }
    static I ipack4(I q0, I q1, I q2, I q3) {
        const I low = _mm512_or_si512(q0, _mm512_slli_epi32(q1, 8));
        return _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(q2, 16), _mm512_slli_epi32(q3, 24), 0xfe);
    }
    static I ibytes_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        const I bytes = _mm512_packus_epi16(_mm512_packs_epi32(q0, q1), _mm512_packs_epi32(q2, q3));
        return _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
    }
    static I ipack4_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        // Four pixels of a channel lie together, and become four channels of a pixel.
        return _mm512_shuffle_epi8(
            ibytes_clamped(q0, q1, q2, q3, low, high),
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    }
    static I ibytes_of(I a, int i) {
        const __m128i first = _mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1);
        const __m128i more = _mm_set1_epi32(4 * i);  // of the low byte of each lane; the others stay negative
        return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(_mm_or_si128(first, more)));
    }
    static I iload_quarters(const unsigned char* p, int64_t pitch) {
        const auto quarter = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * pitch)); };
        I a = _mm512_inserti32x4(_mm512_castsi128_si512(quarter(0)), quarter(1), 1);
        a = _mm512_inserti32x4(a, quarter(2), 2);
        return _mm512_inserti32x4(a, quarter(3), 3);
    }
    static void istore_quarters(unsigned char* p, int64_t pitch, int lanes, I a) {
        const __mmask8 mask = static_cast<__mmask8>((1u << lanes) - 1u);
        const auto store = [&](int i, __m128i x) {
            // Else GCC stores as it extracts, which touches lanes that are masked out too.
            __asm__("" : "+v"(x));
            _mm_mask_storeu_epi32(p + i * pitch, mask, x);
        };
        store(0, _mm512_castsi512_si128(a));
        store(1, _mm512_extracti32x4_epi32(a, 1));
        store(2, _mm512_extracti32x4_epi32(a, 2));
        store(3, _mm512_extracti32x4_epi32(a, 3));
    }
    static I iscale_bytes(I x, int least, int most, int factor, int offset, int shift) {
        const I times = _mm512_set1_epi16(static_cast<short>(factor));
        const I plus = _mm512_set1_epi16(static_cast<short>(offset));
        const __m128i by = _mm_cvtsi32_si128(shift);
        x = _mm512_subs_epu8(x, _mm512_set1_epi8(static_cast<char>(least)));
        x = _mm512_min_epu8(x, _mm512_set1_epi8(static_cast<char>(most - least)));
        const I even = _mm512_and_si512(x, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(x, 8);
        const I low = _mm512_srl_epi16(_mm512_add_epi16(_mm512_mullo_epi16(even, times), plus), by);
        const I high = _mm512_srl_epi16(_mm512_add_epi16(_mm512_mullo_epi16(odd, times), plus), by);
        return _mm512_or_si512(low, _mm512_slli_epi16(high, 8));
    }
    static I ibytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I ibyte(I a, int j) {
        return _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(8 * j)), _mm512_set1_epi32(255));
    }
    static I iset_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static I iadd_bytes(I a, I b) { return _mm512_add_epi8(a, b); }
    static I isub_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I isar(I a, int count) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(count)); }
    static I imerge(I old, uint32_t mask, I a) { return _mm512_mask_mov_epi32(old, static_cast<__mmask16>(mask), a); }
    static I ipick(I a, I b, I index) { return _mm512_permutex2var_epi32(a, index, b); }
    static void transpose_bytes(I (&x)[4]) {
        // Of every four pixels the codes of a channel together.
        const I together = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (I& one : x) one = _mm512_shuffle_epi8(one, together);
        interleave_bytes(x);
    }
    static void interleave_bytes(I (&x)[4]) {
        const I low01 = _mm512_unpacklo_epi8(x[0], x[1]), low23 = _mm512_unpacklo_epi8(x[2], x[3]);
        const I high01 = _mm512_unpackhi_epi8(x[0], x[1]), high23 = _mm512_unpackhi_epi8(x[2], x[3]);
        x[0] = _mm512_unpacklo_epi16(low01, low23);
        x[1] = _mm512_unpackhi_epi16(low01, low23);
        x[2] = _mm512_unpacklo_epi16(high01, high23);
        x[3] = _mm512_unpackhi_epi16(high01, high23);
    }
    static I max_bytes(I a, I b) { return _mm512_max_epu8(a, b); }
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        return _mm512_dpbusd_epi32(acc, a, w);
    }

    static F fset(float value) { return _mm512_set1_ps(value); }
    static F fload(const float* p) { return _mm512_loadu_ps(p); }
    static F fload_mask(const float* p, uint32_t mask) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    }
    static F fload_even(const float* p) {
        const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return _mm512_permutex2var_ps(fload(p), even, fload(p + L));
    }
    static void fstore(float* p, F a) { _mm512_storeu_ps(p, a); }
    static void fstore_mask(float* p, uint32_t mask, F a) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), a); }
    static F fload_quarters(const float* p, int64_t pitch, int lanes) {
        const __mmask8 mask = static_cast<__mmask8>((1u << lanes) - 1u);
        const auto quarter = [&](int i) { return _mm_maskz_loadu_ps(mask, p + i * pitch); };
        F a = _mm512_insertf32x4(_mm512_castps128_ps512(quarter(0)), quarter(1), 1);
        a = _mm512_insertf32x4(a, quarter(2), 2);
        return _mm512_insertf32x4(a, quarter(3), 3);
    }
    static void fstore_quarters(float* p, int64_t pitch, int lanes, F a) {
        istore_quarters(reinterpret_cast<unsigned char*>(p), 4 * pitch, lanes, _mm512_castps_si512(a));
    }
    static void ftranspose(F (&x)[4]) {
        const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
        const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
        const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
        const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
        x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
        x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
        x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
        x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
    }
    static F fcvt(I a) { return _mm512_cvtepi32_ps(a); }
    static F ffma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fadd(F a, F b) { return _mm512_add_ps(a, b); }
    static F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fdiv(F a, F b) { return _mm512_div_ps(a, b); }
    static F fbits(I a) { return _mm512_castsi512_ps(a); }
    static F fmax(F a, F b) { return _mm512_max_ps(a, b); }
    static F fmin(F a, F b) { return _mm512_min_ps(a, b); }
    static F flarger(F best, F value) {
        const F result = fmax(value, best);
        return _mm512_mask_mov_ps(result, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), value);
    }
    static F fround(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I ifromf(F a) { return _mm512_cvtps_epi32(a); }
    static F fkeep_inside(F x, F low, F high, F a) {
        const __mmask16 above_low = _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ);
        return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above_low, x, high, _CMP_LE_OQ), a);
    }
    static F fkeep_above(F x, F high, F a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, high, _CMP_GT_OQ), a); }
    static float fsum(F a) { return _mm512_reduce_add_ps(a); }

    static F fload_bf16(const uint16_t* p) {
        const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static I bf16_bits(F a) {  // in the low half of each lane; AVX512-BF16 would flush subnormals, so by hand
        const I bits = _mm512_castps_si512(a);
        const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const I sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
    }
    static void fstore_bf16(uint16_t* p, F a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(a)));
    }
    static F fround_bf16(F a) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(a), 16)); }
    static F fround_f16(F a) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

}  // namespace
