// Vector type of the AVX2 kernels (with FMA and F16C), and of those with AVX-VNNI beside it: 8 lanes. The names are
// explained in simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int L = 8;
#if defined(__AVXVNNI__)
    static constexpr double kDotCycles = 0.5;
    static constexpr bool kNarrowDot = false;
#else
    static constexpr double kDotCycles = 1.5;
    static constexpr bool kNarrowDot = true;  // dot<false> takes pairs of products of at most 16 bits
#endif
    static constexpr int kSumVectors = 4;
    static constexpr int kShortVectors = 2;

    using I = __m256i;
    using F = __m256;

    static I lane_mask(uint32_t mask) {  // bit i -> lane i all ones
        const I bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
    }
    static I izero() { return _mm256_setzero_si256(); }
    static I iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void istore(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
    static I iload_mask(I old, uint32_t mask, const void* p) {
        const I lanes = lane_mask(mask);
        const I loaded = _mm256_maskload_epi32(static_cast<const int*>(p), lanes);
        return _mm256_blendv_epi8(old, loaded, lanes);
    }
    static void istore_mask(void* p, uint32_t mask, I a) {
        _mm256_maskstore_epi32(static_cast<int*>(p), lane_mask(mask), a);
    }
    static void istore_compress(void* p, uint32_t mask, I a) {
        alignas(32) int32_t lanes[L];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a);
        char* bytes = static_cast<char*>(p);
        for (; mask; mask &= mask - 1, bytes += 4) __builtin_memcpy(bytes, &lanes[__builtin_ctz(mask)], 4);
    }
    static void istore_apart(void* even, void* odd, I a) {
        const I lanes = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        _mm_storeu_si128(static_cast<__m128i*>(even), _mm256_castsi256_si128(lanes));
        _mm_storeu_si128(static_cast<__m128i*>(odd), _mm256_extracti128_si256(lanes, 1));
    }
    static I igather(const void* p, const int32_t* offsets) {
        return _mm256_i32gather_epi32(static_cast<const int*>(p), iload(offsets), 1);
    }
    static I ipermute(I a, I lanes) { return _mm256_permutevar8x32_epi32(a, lanes); }
    static I ibroadcast(const void* p) {
        int32_t value;
        __builtin_memcpy(&value, p, 4);
        return _mm256_set1_epi32(value);
    }
    static I iset(int32_t value) { return _mm256_set1_epi32(value); }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static void settle(I& a) { __asm__("" : "+x"(a)); }
    static I iquarters(const void* p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static I ishl(I a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
    static I ipack4(I q0, I q1, I q2, I q3) {
        const I low = _mm256_or_si256(q0, _mm256_slli_epi32(q1, 8));
        return _mm256_or_si256(low, _mm256_or_si256(_mm256_slli_epi32(q2, 16), _mm256_slli_epi32(q3, 24)));
    }
    static I ibytes_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        const I bytes = _mm256_packus_epi16(_mm256_packs_epi32(q0, q1), _mm256_packs_epi32(q2, q3));
        return _mm256_min_epu8(_mm256_max_epu8(bytes, low), high);
    }
    static I ipack4_clamped(I q0, I q1, I q2, I q3, I low, I high) {
        // Four pixels of a channel lie together, and become four channels of a pixel.
        return _mm256_shuffle_epi8(
            ibytes_clamped(q0, q1, q2, q3, low, high),
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    }
    static I ibytes_of(I a, int i) {
        const __m128i first = _mm_setr_epi8(0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1);
        const __m128i more = _mm_set1_epi32(4 * i);  // of the low byte of each lane; the others stay negative
        return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(_mm_or_si128(first, more)));
    }
    static I iload_quarters(const unsigned char* p, int64_t pitch) {
        return _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(p + pitch), reinterpret_cast<const __m128i*>(p));
    }
    static __m128i first_lanes(int lanes) { return _mm_cmpgt_epi32(_mm_set1_epi32(lanes), _mm_setr_epi32(0, 1, 2, 3)); }
    static void istore_quarters(unsigned char* p, int64_t pitch, int lanes, I a) {
        if (lanes == 4)
            return _mm256_storeu2_m128i(reinterpret_cast<__m128i*>(p + pitch), reinterpret_cast<__m128i*>(p), a);
        const __m128i mask = first_lanes(lanes);
        _mm_maskstore_epi32(reinterpret_cast<int*>(p), mask, _mm256_castsi256_si128(a));
        _mm_maskstore_epi32(reinterpret_cast<int*>(p + pitch), mask, _mm256_extracti128_si256(a, 1));
    }
    static I iscale_bytes(I x, int least, int most, int factor, int offset, int shift) {
        const I times = _mm256_set1_epi16(static_cast<short>(factor));
        const I plus = _mm256_set1_epi16(static_cast<short>(offset));
        const __m128i by = _mm_cvtsi32_si128(shift);
        x = _mm256_subs_epu8(x, _mm256_set1_epi8(static_cast<char>(least)));
        x = _mm256_min_epu8(x, _mm256_set1_epi8(static_cast<char>(most - least)));
        const I even = _mm256_and_si256(x, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(x, 8);
        const I low = _mm256_srl_epi16(_mm256_add_epi16(_mm256_mullo_epi16(even, times), plus), by);
        const I high = _mm256_srl_epi16(_mm256_add_epi16(_mm256_mullo_epi16(odd, times), plus), by);
        return _mm256_or_si256(low, _mm256_slli_epi16(high, 8));
    }
    static I ibytes(const uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static I ibyte(I a, int j) {
        return _mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128(8 * j)), _mm256_set1_epi32(255));
    }
    static I iset_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
    static I iadd_bytes(I a, I b) { return _mm256_add_epi8(a, b); }
    static I isub_bytes(I a, I b) { return _mm256_sub_epi8(a, b); }
    static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I isar(I a, int count) { return _mm256_sra_epi32(a, _mm_cvtsi32_si128(count)); }
    static I imerge(I old, uint32_t mask, I a) { return _mm256_blendv_epi8(old, a, lane_mask(mask)); }
    static I ipick(I a, I b, I index) {
        const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
        const __m256 low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(a, index));
        const __m256 high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(b, index));
        return _mm256_castps_si256(_mm256_blendv_ps(low, high, second));
    }
    static void transpose_bytes(I (&x)[4]) {
        // Of every four pixels the codes of a channel together.
        const __m128i place = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (I& one : x) one = _mm256_shuffle_epi8(one, _mm256_broadcastsi128_si256(place));
        interleave_bytes(x);
    }
    static void interleave_bytes(I (&x)[4]) {
        const I low01 = _mm256_unpacklo_epi8(x[0], x[1]), low23 = _mm256_unpacklo_epi8(x[2], x[3]);
        const I high01 = _mm256_unpackhi_epi8(x[0], x[1]), high23 = _mm256_unpackhi_epi8(x[2], x[3]);
        x[0] = _mm256_unpacklo_epi16(low01, low23);
        x[1] = _mm256_unpackhi_epi16(low01, low23);
        x[2] = _mm256_unpacklo_epi16(high01, high23);
        x[3] = _mm256_unpackhi_epi16(high01, high23);
    }
    static I max_bytes(I a, I b) { return _mm256_max_epu8(a, b); }
#if defined(__AVXVNNI__)
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        return _mm256_dpbusd_avx_epi32(acc, a, w);
    }
#else
    // vpmaddubsw saturates at 16 bits: two products of 255 * 64 still fit, those of full 8 bits do not and take the
    // wide way.
    template <bool kWide>
    static I dot(I acc, I a, I w) {
        if constexpr (!kWide) {
            const I pairs = _mm256_maddubs_epi16(a, w);
            return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        } else {
            const I a_even = _mm256_and_si256(a, _mm256_set1_epi16(255));
            const I a_odd = _mm256_srli_epi16(a, 8);
            const I w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
            const I w_odd = _mm256_srai_epi16(w, 8);
            const I sum = _mm256_add_epi32(_mm256_madd_epi16(a_even, w_even), _mm256_madd_epi16(a_odd, w_odd));
            return _mm256_add_epi32(acc, sum);
        }
    }
#endif

    static F fset(float value) { return _mm256_set1_ps(value); }
    static F fload(const float* p) { return _mm256_loadu_ps(p); }
    static F fload_mask(const float* p, uint32_t mask) { return _mm256_maskload_ps(p, lane_mask(mask)); }
    static F fload_even(const float* p) {
        const F pairs = _mm256_shuffle_ps(fload(p), fload(p + L), 0x88);
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
    }
    static void fstore(float* p, F a) { _mm256_storeu_ps(p, a); }
    static void fstore_mask(float* p, uint32_t mask, F a) { _mm256_maskstore_ps(p, lane_mask(mask), a); }
    static F fload_quarters(const float* p, int64_t pitch, int lanes) {
        const __m128i mask = first_lanes(lanes);
        return _mm256_set_m128(_mm_maskload_ps(p + pitch, mask), _mm_maskload_ps(p, mask));
    }
    static void fstore_quarters(float* p, int64_t pitch, int lanes, F a) {
        istore_quarters(reinterpret_cast<unsigned char*>(p), 4 * pitch, lanes, _mm256_castps_si256(a));
    }
    static void ftranspose(F (&x)[4]) {
        const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1]));
        const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]));
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
        const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
        x[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
        x[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
        x[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
        x[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
    }
    static F fcvt(I a) { return _mm256_cvtepi32_ps(a); }
    static F ffma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fadd(F a, F b) { return _mm256_add_ps(a, b); }
    static F fsub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F fmul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fdiv(F a, F b) { return _mm256_div_ps(a, b); }
    static F fbits(I a) { return _mm256_castsi256_ps(a); }
    static F fmax(F a, F b) { return _mm256_max_ps(a, b); }
    static F fmin(F a, F b) { return _mm256_min_ps(a, b); }
    static F flarger(F best, F value) {
        return _mm256_blendv_ps(fmax(value, best), value, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    }
    static F fround(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I ifromf(F a) { return _mm256_cvtps_epi32(a); }
    static F fkeep_inside(F x, F low, F high, F a) {
        const F inside = _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ));
        return _mm256_and_ps(inside, a);
    }
    static F fkeep_above(F x, F high, F a) { return _mm256_and_ps(_mm256_cmp_ps(x, high, _CMP_GT_OQ), a); }
    static float fsum(F a) {
        alignas(32) float lanes[L];
        _mm256_store_ps(lanes, a);
        float total = 0.0f;
        for (float lane : lanes) total += lane;
        return total;
    }

    static F fload_bf16(const uint16_t* p) {
        const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static I bf16_bits(F a) {
        const I bits = _mm256_castps_si256(a);
        const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const I sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    }
    static void fstore_bf16(uint16_t* p, F a) {
        const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_bits(a), izero()), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static F fround_bf16(F a) { return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(a), 16)); }
    static F fround_f16(F a) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

}  // namespace
