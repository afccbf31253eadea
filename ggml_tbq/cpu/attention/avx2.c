// SPDX-License-Identifier: MIT
// Attention with AVX2, FMA and F16C.
#include "attention.h"
#include "../tbq-dot4.h"

#include <immintrin.h>
#include <math.h>

#define TBQ_ATTENTION tbq_attention_avx2

typedef struct {
    __m256 lo, hi;
} lanes;

static inline lanes lanes_load(const float * p) {
    const lanes r = { _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) };
    return r;
}

static inline void lanes_store(float * p, lanes a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

static inline lanes lanes_set(float x) {
    const lanes r = { _mm256_set1_ps(x), _mm256_set1_ps(x) };
    return r;
}

#define DEFINE(name)                                                                        \
    static inline lanes lanes_##name(lanes a, lanes b) {                                    \
        const lanes r = { _mm256_##name##_ps(a.lo, b.lo), _mm256_##name##_ps(a.hi, b.hi) }; \
        return r;                                                                           \
    }
DEFINE(add)
DEFINE(sub)
DEFINE(mul)
DEFINE(div)
DEFINE(max)
#undef DEFINE

static inline lanes lanes_abs(lanes a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const lanes  r    = { _mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi) };
    return r;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c) {
    const lanes r = { _mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi) };
    return r;
}

static inline lanes lanes_halves(const uint16_t * h) {
    const lanes r = { _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) h)),
                      _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (h + 8))) };
    return r;
}

static inline lanes lanes_bytes(const int8_t * b) {
    const __m128i v = _mm_loadu_si128((const __m128i *) b);
    const lanes   r = { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))) };
    return r;
}

static inline __m256 power(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}

static inline lanes lanes_power(lanes n) {
    const lanes r = { power(n.lo), power(n.hi) };
    return r;
}

static inline lanes lanes_pick(lanes x, lanes limit, lanes a, lanes b) {
    const lanes r = { _mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, limit.lo, _CMP_GT_OQ)),
                      _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, limit.hi, _CMP_GT_OQ)) };
    return r;
}

static inline unsigned lanes_unbounded(lanes x) {
    const __m256 inf = _mm256_set1_ps(INFINITY);
    return (unsigned) (_mm256_movemask_ps(_mm256_cmp_ps(x.lo, inf, _CMP_NLT_UQ)) |
                       _mm256_movemask_ps(_mm256_cmp_ps(x.hi, inf, _CMP_NLT_UQ)) << 8);
}

static inline float lanes_sum(lanes x) {
    const __m256 a = _mm256_add_ps(x.lo, x.hi);
    __m128       s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s              = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float lanes_reduce_max(lanes x) {
    const __m256 a = _mm256_max_ps(x.lo, x.hi);
    __m128       s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s              = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// --- keys -------------------------------------------------------------------------------------------------------
//
// The panel: 16 x 64 x 4 bytes, levels + 64 (of tbq8_0: as they are) of elements 4 j .. 4 j + 3 of row r at [j][r].

TBQ_INLINE __m256i level_table(int bits, int bias) {
    const __m128i levels = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    return _mm256_broadcastsi128_si256(_mm_add_epi8(levels, _mm_set1_epi8((char) bias)));
}

// The 4 x 4 transpose of 32-bit numbers in both halves.
static inline void transpose4(__m256i v[4]) {
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c);
    v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d);
    v[3] = _mm256_unpackhi_epi64(b, d);
}

static inline __m256i load_halves(const void * lo, const void * hi) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) lo)),
                                   _mm_loadu_si128((const __m128i *) hi), 1);
}

// 16 bytes of rows r .. r + 7, which lie at src in row 0: word w of the eight.
static inline void packed_words(const uint8_t * src, size_t stride, int n, int r, __m256i w[4]) {
    for (int i = 0; i < 4; i++) {
        w[i] = load_halves(row_of(src, stride, n, r + i), row_of(src, stride, n, r + i + 4));
    }
    transpose4(w);
}

// Words 0 and 1 of the high bit planes of rows r .. r + 7.
static inline void qh_words(const uint64_t * qh, int r, __m256i h[2]) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i a     = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *) (qh + r)), order);
    const __m256i b     = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *) (qh + r + 4)), order);
    h[0]                = _mm256_permute2x128_si256(a, b, 0x20);
    h[1]                = _mm256_permute2x128_si256(a, b, 0x31);
}

// Bit `bit` of each byte as a 4, or 0.
static inline __m256i qh_as_four(__m256i h, int bit) {
    const __m256i moved = bit > 2 ? _mm256_srli_epi16(h, bit - 2) : _mm256_slli_epi16(h, 2 - bit);
    return _mm256_and_si256(moved, _mm256_set1_epi8(4));
}

static inline void store_keys(uint8_t * panel, int j, int r, __m256i v) {
    _mm256_storeu_si256((__m256i *) (panel + (j * TBQ_TILE + r) * 4), v);
}

TBQ_INLINE void unpack_keys(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                            uint8_t * panel) {
    const __m256i table = level_table(bits, 64);
    for (int r = 0; r < TBQ_TILE; r += 8) {
        __m256i w[4], h[2];
        if (bits == 8) {
            for (int quarter = 0; quarter < 4; quarter++) {
                packed_words(tbq_exact_qs(block) + 16 * quarter, stride, n, r, w);
                for (int i = 0; i < 4; i++) {
                    store_keys(panel, 4 * quarter + i, r, w[i]);
                }
            }
            continue;
        }
        if (bits == 4) {
            const __m256i nibble = _mm256_set1_epi8(15);
            for (int half = 0; half < 2; half++) {
                packed_words(tbq_qs(block) + 16 * half, stride, n, r, w);
                for (int i = 0; i < 4; i++) {
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w[i], 4), nibble);
                    store_keys(panel, 4 * half + i, r, _mm256_shuffle_epi8(table, _mm256_and_si256(w[i], nibble)));
                    store_keys(panel, 4 * half + i + 8, r, _mm256_shuffle_epi8(table, high));
                }
            }
            continue;
        }
        packed_words(tbq_qs(block), stride, n, r, w);
        if (bits == 3) {
            qh_words(qh, r, h);
        }
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 4; j++) {
                __m256i index = _mm256_and_si256(_mm256_srli_epi16(w[i], 2 * j), _mm256_set1_epi8(3));
                if (bits == 3) {
                    const int bit = (j & 1) | (i >> 1) << 1 | (j >> 1) << 2; // tbq.h has the order
                    index         = _mm256_or_si256(index, qh_as_four(h[i & 1], bit));
                }
                store_keys(panel, 4 * j + i, r, _mm256_shuffle_epi8(table, index));
            }
        }
    }
}

// Sixteen rows by n queries.
TBQ_INLINE void keys_16(int bits, int n, const uint8_t * panel, const float * scales, const query_block * q,
                        int64_t q_stride, int add, float * logits) {
    __m256i acc[KEYS_AT_ONCE][2];
    for (int i = 0; i < n; i++) {
        acc[i][0] = acc[i][1] = _mm256_set1_epi32(bits == 8 ? 0 : q[i * q_stride].bias);
    }
    for (int j = 0; j < 16; j++) {
        const __m256i k0 = _mm256_loadu_si256((const __m256i *) (panel + j * TBQ_TILE * 4));
        const __m256i k1 = _mm256_loadu_si256((const __m256i *) (panel + j * TBQ_TILE * 4 + 32));
        for (int i = 0; i < n; i++) {
            int32_t word;
            memcpy(&word, q[i * q_stride].qs + 4 * j, 4);
            const __m256i four = _mm256_set1_epi32(word);
            acc[i][0]          = bits == 8 ? dot4_exact(acc[i][0], k0, four) : dot4(acc[i][0], k0, four);
            acc[i][1]          = bits == 8 ? dot4_exact(acc[i][1], k1, four) : dot4(acc[i][1], k1, four);
        }
    }
    for (int i = 0; i < n; i++) {
        const __m256 d = _mm256_set1_ps(q[i * q_stride].d);
        for (int half = 0; half < 2; half++) {
            float *      s   = logits + i * TBQ_TILE + 8 * half;
            const __m256 old = add ? _mm256_loadu_ps(s) : _mm256_setzero_ps();
            const __m256 x   = _mm256_mul_ps(_mm256_loadu_ps(scales + 8 * half), _mm256_cvtepi32_ps(acc[i][half]));
            _mm256_storeu_ps(s, _mm256_fmadd_ps(x, d, old));
        }
    }
}

TBQ_INLINE void keys_n(int bits, int n, const uint8_t * panel, const float * scales, const query_block * q,
                       int64_t q_stride, int add, float * logits) {
    for (int r = 0; r < TBQ_TILE; r += 16) {
        keys_16(bits, n, panel + 4 * r, scales + r, q, q_stride, add, logits + r);
    }
}

// --- values -----------------------------------------------------------------------------------------------------
//
// The panel: 32 x 64 x 2 bytes, levels of element c of rows 2 p and 2 p + 1 at [p][c].  They are widened to 16 bits
// when they are used: that costs one instruction for every 2 n multiply-adds, and half the memory.

// Sixteen channels of two rows.
static inline void store_bytes(uint8_t * panel, int pair, int c, __m256i v) {
    _mm256_storeu_si256((__m256i *) (panel + (pair * TBQ_BLOCK + c) * 2), v);
}

// Their indices, looked up.
static inline void store_values(uint8_t * panel, int pair, int c, __m256i table, __m256i index) {
    store_bytes(panel, pair, c, _mm256_shuffle_epi8(table, index));
}

// 32 bytes of two rows interleaved.
static inline void interleave_32(const uint8_t * a, const uint8_t * b, __m256i * lo, __m256i * hi) {
    // quarters 0 2 1 3, so that interleaving within halves leaves the channels in order
    const __m256i x = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *) a), 0xD8);
    const __m256i y = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *) b), 0xD8);
    *lo             = _mm256_unpacklo_epi8(x, y);
    *hi             = _mm256_unpackhi_epi8(x, y);
}

TBQ_INLINE void unpack_values(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                              uint8_t * panel) {
    const __m256i table = level_table(bits, 0);
    for (int p = 0; p < TBQ_TILE / 2; p++) {
        const uint8_t * a = tbq_qs(row_of(block, stride, n, 2 * p));
        const uint8_t * b = tbq_qs(row_of(block, stride, n, 2 * p + 1));
        __m256i         lo, hi;
        if (bits == 8) {
            a += tbq_exact_qs(block) - tbq_qs(block);
            b += tbq_exact_qs(block) - tbq_qs(block);
            for (int c = 0; c < TBQ_BLOCK; c += 32) {
                interleave_32(a + c, b + c, &lo, &hi);
                store_bytes(panel, p, c, lo);
                store_bytes(panel, p, c + 16, hi);
            }
            continue;
        }
        if (bits == 4) {
            const __m256i nibble = _mm256_set1_epi8(15);
            interleave_32(a, b, &lo, &hi);
            store_values(panel, p, 0, table, _mm256_and_si256(lo, nibble));
            store_values(panel, p, 16, table, _mm256_and_si256(hi, nibble));
            store_values(panel, p, 32, table, _mm256_and_si256(_mm256_srli_epi16(lo, 4), nibble));
            store_values(panel, p, 48, table, _mm256_and_si256(_mm256_srli_epi16(hi, 4), nibble));
            continue;
        }
        const __m128i x = _mm_loadu_si128((const __m128i *) a), y = _mm_loadu_si128((const __m128i *) b);
        const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
        __m256i       h   = _mm256_setzero_si256();
        if (bits == 3) { // bytes i & 7 of both rows, and of bits j the one for i < 8 below, for i >= 8 above
            const __m128i t = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *) (qh + 2 * p)),
                                                _mm_loadl_epi64((const __m128i *) (qh + 2 * p + 1)));
            h               = _mm256_set_m128i(_mm_srli_epi16(t, 2), t);
        }
        for (int j = 0; j < 4; j++) {
            __m256i index = _mm256_and_si256(_mm256_srli_epi16(low, 2 * j), _mm256_set1_epi8(3));
            if (bits == 3) {
                index = _mm256_or_si256(index, qh_as_four(h, (j & 1) | (j >> 1) << 2));
            }
            store_values(panel, p, 16 * j, table, index);
        }
    }
}

static inline void round_weights(const lanes x[4], int16_t * rounded, int32_t * sum) {
    (void) sum;
    for (int r = 0; r < 4; r++) {
        const __m256i v = _mm256_packs_epi32(_mm256_cvtps_epi32(x[r].lo), _mm256_cvtps_epi32(x[r].hi));
        _mm256_storeu_si256((__m256i *) (rounded + 16 * r), _mm256_permute4x64_epi64(v, 0xD8));
    }
}

#define VALUES_AT_ONCE 4

// Sixteen channels by n queries.
TBQ_INLINE void values_16(int n, const uint8_t * panel, const int16_t * weights, const float * rescale,
                          const float * factor, float * sum, int64_t sum_stride) {
    __m256i acc[VALUES_AT_ONCE][2];
    for (int i = 0; i < n; i++) {
        acc[i][0] = acc[i][1] = _mm256_setzero_si256();
    }
    for (int p = 0; p < TBQ_TILE / 2; p++) {
        const __m256i v0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) (panel + p * TBQ_BLOCK * 2)));
        const __m256i v1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) (panel + p * TBQ_BLOCK * 2 + 16)));
        for (int i = 0; i < n; i++) {
            int32_t word;
            memcpy(&word, weights + i * TBQ_TILE + 2 * p, 4);
            const __m256i two = _mm256_set1_epi32(word);
            acc[i][0]         = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(v0, two));
            acc[i][1]         = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(v1, two));
        }
    }
    for (int i = 0; i < n; i++) {
        const __m256 old_factor = _mm256_set1_ps(rescale[i]);
        const __m256 new_factor = _mm256_set1_ps(factor[i]);
        for (int half = 0; half < 2; half++) {
            float *      s   = sum + i * sum_stride + 8 * half;
            const __m256 old = _mm256_mul_ps(old_factor, _mm256_loadu_ps(s));
            _mm256_storeu_ps(s, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][half]), new_factor, old));
        }
    }
}

TBQ_INLINE void values_n(int bits, int n, const uint8_t * panel, const int16_t * weights, const int32_t * weight_sums,
                         const float * rescale, const float * factor, float * sum, int64_t sum_stride) {
    (void) bits, (void) weight_sums; // the levels are not biased
    for (int c = 0; c < TBQ_BLOCK; c += 16) {
        values_16(n, panel + 2 * c, weights, rescale, factor, sum + c, sum_stride);
    }
}

#include "tile.inc"
