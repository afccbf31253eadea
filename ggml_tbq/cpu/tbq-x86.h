// SPDX-License-Identifier: MIT
// What the AVX2 and AVX-512 implementations share: unpacking, levels and dot products, all in 256 bits.
// Two vectors hold the 64 bytes of a block: elements 0..31 and 32..63.  Each 128-bit lane has 16 consecutive elements.
#pragma once

#include "tbq-dot4.h"

#include <immintrin.h>
#include <math.h>

#ifdef _MSC_VER
#include <intrin.h>
#include <windows.h>
#elif defined(__clang__) && __clang_major__ < 18
#include <cpuid.h>

// Older clang has no __builtin_cpu_supports("f16c"), so this reads bit 29 of ecx in CPUID leaf 1.  It is read once,
// when the library is loaded, although it is needed for each row: CPUID exits from a virtual machine, which takes
// microseconds, and a prompt took 50 times as long.
static int has_f16c;

__attribute__((constructor)) static void find_f16c(void) {
    unsigned int eax, ebx, ecx, edx;
    has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

static inline int cpu_has_f16c(void) {
    return has_f16c;
}
#else
static inline int cpu_has_f16c(void) {
    return __builtin_cpu_supports("f16c");
}
#endif

typedef struct {
    __m256i lo, hi;
} bytes64;

static const uint32_t sign_mask[TBQ_BLOCK] = TBQ_LIST_64(TBQ_SIGN_MASK);

static inline float half_to_float(uint16_t h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

// The high bit plane: each 64-bit half lane (j, i >> 3) tests one bit of every qh byte (tbq.h has the order).
TBQ_INLINE bytes64 qh_bits(const void * block) {
    int64_t qh;
    memcpy(&qh, tbq_qh(block), 8);
    const __m256i h    = _mm256_set1_epi64x(qh);
    const __m256i four = _mm256_set1_epi8(4);
    const __m256i lo =
        _mm256_set_epi64x(0x0808080808080808, 0x0202020202020202, 0x0404040404040404, 0x0101010101010101);
    const __m256i hi   = _mm256_slli_epi16(lo, 4);
    const bytes64 bits = {
        _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(h, lo), lo), four),
        _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(h, hi), hi), four),
    };
    return bits;
}

TBQ_INLINE bytes64 indices(int bits, const void * block) {
    bytes64 r;
    if (bits == 4) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i qs     = _mm256_loadu_si256((const __m256i *) tbq_qs(block));
        r.lo                 = _mm256_and_si256(qs, nibble);
        r.hi                 = _mm256_and_si256(_mm256_srli_epi16(qs, 4), nibble);
        return r;
    }
    const __m256i pair = _mm256_set1_epi8(3);
    const __m256i qs   = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) tbq_qs(block)));
    const __m256i even = _mm256_srlv_epi32(qs, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0)); // j = 0 | 1
    r.lo               = _mm256_and_si256(even, pair);
    r.hi               = _mm256_and_si256(_mm256_srli_epi16(even, 4), pair); // j = 2 | 3
    if (bits == 3) {
        const bytes64 high = qh_bits(block);
        r.lo               = _mm256_or_si256(r.lo, high.lo);
        r.hi               = _mm256_or_si256(r.hi, high.hi);
    }
    return r;
}

// The levels plus bias.
TBQ_INLINE bytes64 level_bytes(int bits, const void * block, int bias) {
    const __m128i levels = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    const __m256i table  = _mm256_broadcastsi128_si256(_mm_add_epi8(levels, _mm_set1_epi8((char) bias)));
    const bytes64 i      = indices(bits, block);
    const bytes64 r      = { _mm256_shuffle_epi8(table, i.lo), _mm256_shuffle_epi8(table, i.hi) };
    return r;
}

typedef __m256 dot_sums;

static inline dot_sums dot_zero(void) {
    return _mm256_setzero_ps();
}

TBQ_INLINE dot_sums dot(int bits, const void * block, const block_tbq8_act * a, float f, dot_sums sums) {
    const bytes64 k  = level_bytes(bits, block, 64);
    const __m256i lo = _mm256_loadu_si256((const __m256i *) a->qs);
    const __m256i hi = _mm256_loadu_si256((const __m256i *) (a->qs + 32));
    __m256i       p  = _mm256_loadu_si256((const __m256i *) a->bias);
    p                = dot4(dot4(p, k.lo, lo), k.hi, hi);
    return _mm256_add_ps(sums, _mm256_mul_ps(_mm256_set1_ps(f), _mm256_cvtepi32_ps(p)));
}

static inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s        = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

static inline float dot_total(dot_sums sums) {
    return sum8(sums);
}

// The sums of the eight numbers in a and in b.
static inline void sums8_i32(__m256i a, __m256i b, int32_t * sum_a, int32_t * sum_b) {
    const __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i y = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    const __m128i s = _mm_add_epi32(_mm_unpacklo_epi32(x, y), _mm_unpackhi_epi32(x, y));
    const __m128i t = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    *sum_a          = _mm_cvtsi128_si32(t);
    *sum_b          = _mm_extract_epi32(t, 1);
}

// The levels of the positive half, for vpshufb.
TBQ_INLINE __m128i half_levels(int bits) {
    return _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->half);
}

// bias[] of the activation block: -64 times the sums of qs, in the partial sums that dot4 forms.
static inline void act_bias(const int8_t * qs, int32_t * bias) {
    const __m256i weight = _mm256_set1_epi8(64);
    const __m256i lo     = _mm256_loadu_si256((const __m256i *) qs);
    const __m256i hi     = _mm256_loadu_si256((const __m256i *) (qs + 32));
    const __m256i p      = dot4(dot4(_mm256_setzero_si256(), weight, lo), weight, hi);
    _mm256_storeu_si256((__m256i *) bias, _mm256_sub_epi32(_mm256_setzero_si256(), p));
}
