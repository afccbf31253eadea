// SPDX-License-Identifier: MIT
// Rows with AVX-512 F, BW, DQ and VL.  avx512vnni.c compiles this file again with VNNI.
#include "../tbq-impl.h"
#include "../tbq-x86.h"

#ifdef __AVX512VNNI__
#define TBQ_KERNELS      tbq_kernels_avx512vnni
#define TBQ_ATTENTION    tbq_attention_avx512vnni
#define TBQ_SEARCH       tbq_search_avx512vnni
#define TBQ_KERNELS_NAME "avx512vnni"
#else
#define TBQ_KERNELS      tbq_kernels_avx512
#define TBQ_ATTENTION    tbq_attention_avx512
#define TBQ_SEARCH       tbq_search_avx512
#define TBQ_KERNELS_NAME "avx512"
#endif

static int supported(void) {
#ifdef _MSC_VER
    int r[4];
    __cpuidex(r, 7, 0);
    return IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE) && (r[1] >> 30 & 1) && (r[1] >> 17 & 1) &&
           (r[1] >> 31 & 1)
#ifdef __AVX512VNNI__
           && (r[2] >> 11 & 1)
#endif
        ;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && cpu_has_f16c()
#ifdef __AVX512VNNI__
           && __builtin_cpu_supports("avx512vnni")
#endif
        ;
#endif
}

// One butterfly stage within a vector: partners swapped, a + b everywhere, a - b in the lanes of mask.
#define IN_VECTOR(v, swapped, mask) _mm512_mask_sub_ps(_mm512_add_ps(v, swapped), mask, swapped, v)

static inline __m512 in_vector(__m512 v) {
    v = IN_VECTOR(v, _mm512_permute_ps(v, 0xB1), 0xAAAA);
    v = IN_VECTOR(v, _mm512_permute_ps(v, 0x4E), 0xCCCC);
    v = IN_VECTOR(v, _mm512_shuffle_f32x4(v, v, 0xB1), 0xF0F0);
    return IN_VECTOR(v, _mm512_shuffle_f32x4(v, v, 0x4E), 0xFF00);
}

// H times the 64 floats of v[0..3].
static inline void hadamard(__m512 v[4]) {
    for (int r = 0; r < 4; r++) {
        v[r] = in_vector(v[r]);
    }
    const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
    const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
    v[0] = _mm512_add_ps(a, c);
    v[1] = _mm512_add_ps(b, d);
    v[2] = _mm512_sub_ps(a, c);
    v[3] = _mm512_sub_ps(b, d);
}

static inline void forward(const float * x, float post, float * y) {
    const __m512 p = _mm512_set1_ps(post);
    __m512       v[4];
    for (int r = 0; r < 4; r++) {
        v[r] = _mm512_xor_ps(_mm512_loadu_ps(x + 16 * r), _mm512_loadu_ps((const float *) sign_mask + 16 * r));
    }
    hadamard(v);
    for (int r = 0; r < 4; r++) {
        _mm512_storeu_ps(y + 16 * r, _mm512_mul_ps(p, v[r]));
    }
}

static inline void inverse(const float * y, float post, float * x) {
    const __m512 p = _mm512_set1_ps(post);
    __m512       v[4];
    for (int r = 0; r < 4; r++) {
        v[r] = _mm512_loadu_ps(y + 16 * r);
    }
    hadamard(v);
    for (int r = 0; r < 4; r++) {
        const __m512 sign = _mm512_loadu_ps((const float *) sign_mask + 16 * r);
        _mm512_storeu_ps(x + 16 * r, _mm512_xor_ps(_mm512_mul_ps(p, v[r]), sign));
    }
}

static inline uint32_t abs_max(const float * x) {
    const __m512i mask    = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i       largest = _mm512_setzero_si512();
    for (int i = 0; i < TBQ_BLOCK; i += 16) {
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
    }
    return (uint32_t) _mm512_reduce_max_epi32(largest);
}

static inline float sum_squares(const float * z) {
    const __m512 first = _mm512_loadu_ps(z);
    __m512       p     = _mm512_mul_ps(first, first);
    for (int i = 16; i < TBQ_BLOCK; i += 16) {
        const __m512 v = _mm512_loadu_ps(z + i);
        p              = _mm512_add_ps(p, _mm512_mul_ps(v, v));
    }
    return sum8(_mm256_add_ps(_mm512_castps512_ps256(p), _mm512_extractf32x8_ps(p, 1)));
}

typedef struct {
    __m512i  q[2];     // 32 values each
    uint64_t negative; // a bit each
} coords;

static inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline coords to_fixed(const float * z, float inverse_rms) {
    const __m512 scale = _mm512_set1_ps(inverse_rms);
    const __m512 half  = _mm512_set1_ps(0.5f);
    __m256i      q[4];
    coords       c = { .negative = 0 };
    for (int r = 0; r < 4; r++) {
        const __m512  v     = _mm512_loadu_ps(z + 16 * r);
        const __m512i fixed = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(_mm512_abs_ps(v), scale), half));
        q[r]                = _mm512_cvtepi32_epi16(fixed);
        c.negative |= (uint64_t) _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ) << 16 * r;
    }
    c.q[0] = join(q[0], q[1]);
    c.q[1] = join(q[2], q[3]);
    return c;
}

// The number of thresholds below each of 32 values, plus 0x8000.  As bytes, these are an index, and a byte with the top
// bit set, which vpshufb turns into 0: so one lookup also widens the level to 16 bits.
TBQ_INLINE __m512i count_below(int bits, __m512i q, const int16_t * thresholds) {
    const __m512i one   = _mm512_set1_epi16(1);
    __m512i       count = _mm512_set1_epi16((int16_t) 0x8000);
    for (int t = 0; t < tbq_n_thresholds(bits); t++) {
        count = _mm512_mask_add_epi16(count, _mm512_cmpgt_epi16_mask(q, _mm512_set1_epi16(thresholds[t])), count, one);
    }
    return count;
}

static inline __m512i add_products(__m512i acc, __m512i a, __m512i b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}

static inline __m256i fold(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}

TBQ_INLINE void score(int bits, coords c, const int16_t * thresholds, int32_t * qk, int32_t * kk) {
    const __m512i table = _mm512_broadcast_i32x4(half_levels(bits));
    const __m512i k0    = _mm512_shuffle_epi8(table, count_below(bits, c.q[0], thresholds));
    const __m512i k1    = _mm512_shuffle_epi8(table, count_below(bits, c.q[1], thresholds));
    const __m512i zero  = _mm512_setzero_si512();
    sums8_i32(fold(add_products(add_products(zero, c.q[0], k0), c.q[1], k1)),
              fold(add_products(add_products(zero, k0, k0), k1, k1)), qk, kk);
}

TBQ_INLINE void assign(int bits, coords c, const int16_t * thresholds, uint8_t * index) {
    const __m512i all = _mm512_set1_epi8((char) ((1 << bits) - 1));
    const __m512i m   = join(_mm512_cvtepi16_epi8(count_below(bits, c.q[0], thresholds)), // drops the high byte
                             _mm512_cvtepi16_epi8(count_below(bits, c.q[1], thresholds)));
    const __m512i i   = _mm512_or_si512(m, _mm512_set1_epi8((char) (1 << (bits - 1))));
    // the codebook is odd: the index of -k is the complement of that of k
    _mm512_storeu_si512(index, _mm512_mask_blend_epi8(c.negative, i, _mm512_xor_si512(i, all)));
}

TBQ_INLINE int32_t product(int bits, coords c, const uint8_t * index) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all));
    const __m512i k     = _mm512_shuffle_epi8(table, _mm512_loadu_si512(index));
    const __m512i same  = _mm512_mask_sub_epi8(k, c.negative, _mm512_setzero_si512(), k);
    const __m512i k0    = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(same));
    const __m512i k1    = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(same, 1));
    return _mm512_reduce_add_epi32(add_products(_mm512_madd_epi16(c.q[0], k0), c.q[1], k1));
}

static inline void transform(float * x) {
    __m512 v[4];
    for (int r = 0; r < 4; r++) {
        v[r] = _mm512_loadu_ps(x + 16 * r);
    }
    hadamard(v);
    for (int r = 0; r < 4; r++) {
        _mm512_storeu_ps(x + 16 * r, v[r]);
    }
}

// A 16-byte table as floats, each times d.
static inline __m512 scaled_table(const int8_t * table, float d) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *) table);
    return _mm512_mul_ps(_mm512_set1_ps(d), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

TBQ_INLINE void values(int bits, const uint8_t * index, float * k) {
    const __m512 table = scaled_table(tbq_lookup_table(bits)->all, 1.0f);
    for (int r = 0; r < 4; r++) {
        const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) (index + 16 * r)));
        _mm512_storeu_ps(k + 16 * r, _mm512_permutexvar_ps(i, table));
    }
}

// Every lane of the result is the largest of the lanes of v whose number has the same parity.
static inline __m512 max_by_parity(__m512 v) {
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    return _mm512_max_ps(v, _mm512_permute_ps(v, 0x4E));
}

TBQ_INLINE int32_t coordinate_descent(int bits, const float * m, const float * slope, float d, uint8_t * index) {
    const uint64_t even = 0x5555555555555555;
    const __m512   up   = scaled_table(tbq_gap_table(bits)->up, d);
    const __m512   down = scaled_table(tbq_gap_table(bits)->down, -d);
    const __m512   m0   = _mm512_set1_ps(m[0]);
    const __m512   zero = _mm512_setzero_ps();
    const __m512i  lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i  one  = _mm512_set1_epi32(1);
    __m512         g[4], gain[4];
    __m512i        j[4];
    float          move[TBQ_BLOCK]; // the signed gap in the direction of the slope
    for (int r = 0; r < 4; r++) {
        g[r] = _mm512_loadu_ps(slope + 16 * r);
        j[r] = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) (index + 16 * r)));
    }
    for (int step = 0; step < TBQ_DESCENT_STEPS; step++) {
        uint64_t upwards = 0, best = 0;
        for (int r = 0; r < 4; r++) {
            const __mmask16 above = _mm512_cmp_ps_mask(g[r], zero, _CMP_GT_OQ);
            const __m512    s =
                _mm512_mask_blend_ps(above, _mm512_permutexvar_ps(j[r], down), _mm512_permutexvar_ps(j[r], up));
            const __m512 gap   = _mm512_abs_ps(s);
            const __m512 twice = _mm512_add_ps(_mm512_abs_ps(g[r]), _mm512_abs_ps(g[r]));
            gain[r]            = _mm512_mul_ps(gap, _mm512_sub_ps(twice, _mm512_mul_ps(gap, m0)));
            _mm512_storeu_ps(move + 16 * r, s);
            upwards |= (uint64_t) above << 16 * r;
        }
        const __m512 best_gain =
            max_by_parity(_mm512_max_ps(_mm512_max_ps(gain[0], gain[1]), _mm512_max_ps(gain[2], gain[3])));
        const __mmask16 gains = _mm512_cmp_ps_mask(best_gain, zero, _CMP_GT_OQ);
        if (!gains) {
            break;
        }
        for (int r = 0; r < 4; r++) {
            best |= (uint64_t) _mm512_mask_cmp_ps_mask(gains, gain[r], best_gain, _CMP_EQ_OQ) << 16 * r;
        }
        for (int parity = 0; parity < 2; parity++) {
            const uint64_t half = best & even << parity;
            if (!half) {
                continue;
            }
            const uint64_t first = half & (0 - half);
            const int      at    = TBQ_COUNT_TRAILING_ZEROS(half);
            const __m512   s     = _mm512_set1_ps(move[at]);
            const __m512i  swap  = _mm512_xor_si512(lane, _mm512_set1_epi32(at & 15));
            for (int r = 0; r < 4; r++) {
                const __m512 column = _mm512_permutexvar_ps(swap, _mm512_loadu_ps(m + (16 * r ^ (at & 48))));
                g[r]                = _mm512_sub_ps(g[r], _mm512_mul_ps(s, column));
                j[r]                = _mm512_mask_add_epi32(j[r], (__mmask16) ((first & upwards) >> 16 * r), j[r], one);
                j[r] = _mm512_mask_sub_epi32(j[r], (__mmask16) ((first & ~upwards) >> 16 * r), j[r], one);
            }
        }
    }
    const __m512 table = scaled_table(tbq_lookup_table(bits)->all, 1.0f);
    __m512       kk    = zero;
    for (int r = 0; r < 4; r++) {
        const __m512 k = _mm512_permutexvar_ps(j[r], table);
        kk             = _mm512_add_ps(kk, _mm512_mul_ps(k, k)); // integers below 2^24: exact
        _mm_storeu_si128((__m128i *) (index + 16 * r), _mm512_cvtepi32_epi8(j[r]));
    }
    return (int32_t) _mm512_reduce_add_ps(kk);
}

static inline void act_round(const float * y, float inverse_d, int8_t * qs, int32_t * bias) {
    const __m512 sign  = _mm512_set1_ps(-0.0f);
    const __m512 scale = _mm512_set1_ps(inverse_d);
    const __m512 half  = _mm512_set1_ps(0.5f);
    for (int i = 0; i < TBQ_BLOCK; i += 16) {
        const __m512  v     = _mm512_loadu_ps(y + i);
        const __m512  h     = _mm512_or_ps(_mm512_and_ps(v, sign), half);
        const __m512i codes = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(v, scale), h));
        _mm_storeu_si128((__m128i *) (qs + i), _mm512_cvtepi32_epi8(codes));
    }
    act_bias(qs, bias);
}

// Sixteen levels of a block as floats, from number 16 r on.
TBQ_INLINE __m512 level_floats(const bytes64 * k, int r) {
    const __m256i half = r < 2 ? k->lo : k->hi;
    const __m128i lane = r & 1 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(lane));
}

TBQ_INLINE void levels(int bits, const void * block, float * k) {
    const bytes64 bytes = level_bytes(bits, block, 0);
    for (int r = 0; r < 4; r++) {
        _mm512_storeu_ps(k + 16 * r, level_floats(&bytes, r));
    }
}

TBQ_INLINE void mad(int bits, const void * block, float f, float * acc) {
    const bytes64 bytes = level_bytes(bits, block, 0);
    const __m512  scale = _mm512_set1_ps(f);
    for (int r = 0; r < 4; r++) {
        const __m512 product = _mm512_mul_ps(scale, level_floats(&bytes, r));
        _mm512_storeu_ps(acc + 16 * r, _mm512_add_ps(_mm512_loadu_ps(acc + 16 * r), product));
    }
}

#include "rows.inc"
