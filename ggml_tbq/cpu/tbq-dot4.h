// SPDX-License-Identifier: MIT Adds the sums of four products of adjacent bytes to acc: one instruction where the CPU
// has dot products of bytes, and the same exact result elsewhere.
#pragma once

#ifdef __ARM_NEON

#include <arm_neon.h>

static inline int32x4_t dot4(int32x4_t acc, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(acc, a, b);
#else
    const int32x4_t lo = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t hi = vpaddlq_s16(vmull_high_s8(a, b));
    return vaddq_s32(acc, vpaddq_s32(lo, hi));
#endif
}

#else

#include <immintrin.h>

// u unsigned and s signed; one of them is at most 127 and the other at most 128, so pairs do not saturate
static inline __m256i dot4(__m256i acc, __m256i u, __m256i s) {
#ifdef __AVX512VNNI__
    return _mm256_dpbusd_epi32(acc, u, s);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// The bytes v of exact rows, -127 .. 127, times signed bytes s.  VNNI wants them + 128, which the caller subtracts again.
// Without it the pairs of such products would saturate: s gives its sign to v, and its size is the unsigned factor.
#ifdef __AVX512VNNI__
#define TBQ_EXACT_BIAS 128
#else
#define TBQ_EXACT_BIAS 0
#endif

static inline __m256i dot4_exact(__m256i acc, __m256i v, __m256i s) {
#ifdef __AVX512VNNI__
    return dot4(acc, v, s);
#else
    return dot4(acc, _mm256_abs_epi8(s), _mm256_sign_epi8(v, s));
#endif
}

#ifdef __AVX512BW__
static inline __m512i dot4_512(__m512i acc, __m512i u, __m512i s) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(acc, u, s);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1)));
#endif
}

static inline __m512i dot4_exact_512(__m512i acc, __m512i v, __m512i s) {
#ifdef __AVX512VNNI__
    return dot4_512(acc, v, s);
#else
    const __m512i signs = _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(s), _mm512_setzero_si512(), v);
    return dot4_512(acc, _mm512_abs_epi8(s), signs);
#endif
}
#endif

#endif
