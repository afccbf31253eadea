// SPDX-License-Identifier: MIT
// Attention with AVX-512 F, BW, DQ and VL.  avx512vnni.c compiles this file again with VNNI.
#include "attention.h"
#include "../tbq-dot4.h"

#include <immintrin.h>
#include <math.h>

#ifdef __AVX512VNNI__
#define TBQ_ATTENTION tbq_attention_avx512vnni
#else
#define TBQ_ATTENTION tbq_attention_avx512
#endif

typedef __m512 lanes;

#define lanes_load  _mm512_loadu_ps
#define lanes_store _mm512_storeu_ps
#define lanes_set   _mm512_set1_ps
#define lanes_add   _mm512_add_ps
#define lanes_sub   _mm512_sub_ps
#define lanes_mul   _mm512_mul_ps
#define lanes_div   _mm512_div_ps
#define lanes_max   _mm512_max_ps
#define lanes_abs   _mm512_abs_ps
#define lanes_fma   _mm512_fmadd_ps

static inline lanes lanes_halves(const uint16_t * h) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) h));
}

static inline lanes lanes_bytes(const int8_t * b) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) b)));
}

static inline lanes lanes_power(lanes n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

static inline lanes lanes_pick(lanes x, lanes limit, lanes a, lanes b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), b, a);
}

static inline unsigned lanes_unbounded(lanes x) {
    return _mm512_cmp_ps_mask(x, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
}

static inline float lanes_sum(lanes x) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128       s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s              = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float lanes_reduce_max(lanes x) {
    return _mm512_reduce_max_ps(x);
}

// The levels + 64, for vpshufb.
TBQ_INLINE __m512i level_table(int bits) {
    const __m128i levels = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    return _mm512_broadcast_i32x4(_mm_add_epi8(levels, _mm_set1_epi8(64)));
}

// 32 bytes of two rows.
static inline __m512i load_2(const uint8_t * block, size_t stride, int n, int r0, int r1) {
    const __m256i lo = _mm256_loadu_si256((const __m256i *) tbq_qs(row_of(block, stride, n, r0)));
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo),
                              _mm256_loadu_si256((const __m256i *) tbq_qs(row_of(block, stride, n, r1))), 1);
}

// 16 bytes of rows r, r + 4, r + 8, r + 12, which lie at src in row 0.
static inline __m512i load_4(const uint8_t * src, size_t stride, int n, int r) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *) row_of(src, stride, n, r)));
    v         = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) row_of(src, stride, n, r + 4)), 1);
    v         = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) row_of(src, stride, n, r + 8)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *) row_of(src, stride, n, r + 12)), 3);
}

// The 4 x 4 transpose of 32-bit numbers in each quarter.
static inline void transpose4(__m512i v[4]) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
}

// The indices at bits 2 j of low, with bit `bit` of high above them at 3 bits.
TBQ_INLINE __m512i index_of(int bits, __m512i low, int j, __m512i high, int bit) {
    const __m512i two   = _mm512_set1_epi8(3);
    const __m512i moved = _mm512_srli_epi16(low, (unsigned) (2 * j));
    if (bits == 2) {
        return _mm512_and_si512(moved, two);
    }
    const __m512i four =
        bit > 2 ? _mm512_srli_epi16(high, (unsigned) (bit - 2)) : _mm512_slli_epi16(high, (unsigned) (2 - bit));
    const __m512i both = _mm512_ternarylogic_epi32(two, moved, four, 0xCA); // two ? moved : four
    return _mm512_and_si512(both, _mm512_set1_epi8(7));
}

// --- keys -------------------------------------------------------------------------------------------------------
//
// The panel: 16 x 64 x 4 bytes, levels + 64 (of tbq8_0: + TBQ_EXACT_BIAS) of elements 4 j .. 4 j + 3 of row r at [j][r].

// Signed bytes + TBQ_EXACT_BIAS.
static inline __m512i biased(__m512i v) {
    return _mm512_xor_si512(v, _mm512_set1_epi8((char) TBQ_EXACT_BIAS));
}

TBQ_INLINE __m512i multiply(int bits, __m512i acc, __m512i u, __m512i s) {
    return bits == 8 ? dot4_exact_512(acc, u, s) : dot4_512(acc, u, s);
}

static inline void store_keys(uint8_t * panel, int j, int r, __m512i table, __m512i index) {
    _mm512_storeu_si512(panel + (j * TBQ_TILE + r) * 4, _mm512_shuffle_epi8(table, index));
}

static inline void unpack_keys_4(const uint8_t * block, size_t stride, int n, int r, __m512i table, uint8_t * panel) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i       a[4], b[4]; // words 0..3 of rows r .. r + 3 and words 4..7 of the same, then those of r + 4 ...
    for (int i = 0; i < 4; i++) {
        a[i] = load_2(block, stride, n, r + i, r + 4 + i);
        b[i] = load_2(block, stride, n, r + 8 + i, r + 12 + i);
    }
    transpose4(a);
    transpose4(b);
    for (int i = 0; i < 4; i++) {
        const __m512i w0 = _mm512_shuffle_i32x4(a[i], b[i], 0x88); // word i of 16 rows
        const __m512i w4 = _mm512_shuffle_i32x4(a[i], b[i], 0xDD); // word i + 4
        store_keys(panel, i, r, table, _mm512_and_si512(w0, nibble));
        store_keys(panel, i + 4, r, table, _mm512_and_si512(w4, nibble));
        store_keys(panel, i + 8, r, table, _mm512_and_si512(_mm512_srli_epi16(w0, 4), nibble));
        store_keys(panel, i + 12, r, table, _mm512_and_si512(_mm512_srli_epi16(w4, 4), nibble));
    }
}

TBQ_INLINE void unpack_keys_23(int bits, const uint8_t * block, size_t stride, int n, int r, const uint64_t * qh,
                               __m512i table, uint8_t * panel) {
    __m512i w[4], h[2] = { _mm512_setzero_si512(), _mm512_setzero_si512() };
    for (int i = 0; i < 4; i++) {
        w[i] = load_4(tbq_qs(block), stride, n, r + i);
    }
    transpose4(w);
    if (bits == 3) { // words 0 and 1 of the high bit planes of 16 rows
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i a = _mm512_loadu_si512(qh + r), b = _mm512_loadu_si512(qh + r + 8);
        h[0] = _mm512_permutex2var_epi32(a, even, b);
        h[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            const int bit = (j & 1) | (i >> 1) << 1 | (j >> 1) << 2; // tbq.h has the order
            store_keys(panel, 4 * j + i, r, table, index_of(bits, w[i], j, h[i & 1], bit));
        }
    }
}

static inline void unpack_keys_8(const uint8_t * block, size_t stride, int n, int r, uint8_t * panel) {
    for (int quarter = 0; quarter < 4; quarter++) {
        __m512i w[4];
        for (int i = 0; i < 4; i++) {
            w[i] = load_4(tbq_exact_qs(block) + 16 * quarter, stride, n, r + i);
        }
        transpose4(w);
        for (int i = 0; i < 4; i++) {
            _mm512_storeu_si512(panel + ((4 * quarter + i) * TBQ_TILE + r) * 4, biased(w[i]));
        }
    }
}

TBQ_INLINE void unpack_keys(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                            uint8_t * panel) {
    const __m512i table = level_table(bits);
    for (int r = 0; r < TBQ_TILE; r += 16) {
        if (bits == 8) {
            unpack_keys_8(block, stride, n, r, panel);
        } else if (bits == 4) {
            unpack_keys_4(block, stride, n, r, table, panel);
        } else {
            unpack_keys_23(bits, block, stride, n, r, qh, table, panel);
        }
    }
}

TBQ_INLINE void keys_n(int bits, int n, const uint8_t * panel, const float * scales, const query_block * q,
                       int64_t q_stride, int add, float * logits) {
    __m512i acc[KEYS_AT_ONCE][4];
    for (int i = 0; i < n; i++) {
        for (int r = 0; r < 4; r++) {
            acc[i][r] = _mm512_set1_epi32(q[i * q_stride].bias * (bits == 8 ? TBQ_EXACT_BIAS / 64 : 1));
        }
    }
    for (int j = 0; j < 16; j++) {
        __m512i k[4];
        for (int r = 0; r < 4; r++) {
            k[r] = _mm512_loadu_si512(panel + (j * TBQ_TILE + 16 * r) * 4);
        }
        for (int i = 0; i < n; i++) {
            int32_t word;
            memcpy(&word, q[i * q_stride].qs + 4 * j, 4);
            for (int r = 0; r < 4; r++) {
                acc[i][r] = multiply(bits, acc[i][r], k[r], _mm512_set1_epi32(word));
            }
        }
    }
    for (int i = 0; i < n; i++) {
        const __m512 d = _mm512_set1_ps(q[i * q_stride].d);
        for (int r = 0; r < 4; r++) {
            float *      s   = logits + i * TBQ_TILE + 16 * r;
            const __m512 old = add ? _mm512_loadu_ps(s) : _mm512_setzero_ps();
            const __m512 x   = _mm512_mul_ps(_mm512_loadu_ps(scales + 16 * r), _mm512_cvtepi32_ps(acc[i][r]));
            _mm512_storeu_ps(s, _mm512_fmadd_ps(x, d, old));
        }
    }
}

// --- values -----------------------------------------------------------------------------------------------------
//
// The panel: 16 x 64 x 4 bytes, levels + 64 (of tbq8_0: + TBQ_EXACT_BIAS) of element c of rows 4 g .. 4 g + 3 at [g][c].  Weights are two planes
// of 64 signed bytes, high and low: with bytes on both sides one instruction multiplies four rows, and unpacking
// ends at bytes.

// Bytes of v[0..3] interleaved in each quarter: of the four, bytes 0..3, 4..7, 8..11, 12..15.
static inline void interleave4(__m512i v[4]) {
    const __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpackhi_epi8(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi8(v[2], v[3]), d = _mm512_unpackhi_epi8(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi16(a, c);
    v[1] = _mm512_unpackhi_epi16(a, c);
    v[2] = _mm512_unpacklo_epi16(b, d);
    v[3] = _mm512_unpackhi_epi16(b, d);
}

static inline void store_values(uint8_t * panel, int group, int c, __m512i table, __m512i index) {
    _mm512_storeu_si512(panel + (group * TBQ_BLOCK + c) * 4, _mm512_shuffle_epi8(table, index));
}

// Two groups of four rows, from row r on.
static inline void unpack_values_4(const uint8_t * block, size_t stride, int n, int r, __m512i table, uint8_t * panel) {
    // words of a row in the order that interleaving within quarters undoes
    const __m512i order  = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i       v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_permutexvar_epi32(order, load_2(block, stride, n, r + i, r + 4 + i));
    }
    interleave4(v);
    for (int half = 0; half < 2; half++) {
        const __m512i g0 = _mm512_shuffle_i64x2(v[2 * half], v[2 * half + 1], 0x44);
        const __m512i g1 = _mm512_shuffle_i64x2(v[2 * half], v[2 * half + 1], 0xEE);
        store_values(panel, r / 4, 16 * half, table, _mm512_and_si512(g0, nibble));
        store_values(panel, r / 4, 16 * half + 32, table, _mm512_and_si512(_mm512_srli_epi16(g0, 4), nibble));
        store_values(panel, r / 4 + 1, 16 * half, table, _mm512_and_si512(g1, nibble));
        store_values(panel, r / 4 + 1, 16 * half + 32, table, _mm512_and_si512(_mm512_srli_epi16(g1, 4), nibble));
    }
}

// Bytes i & 7 of the high bit planes of four rows interleaved, i = 0 .. 15; from i = 8 on two bits lower, where those
// of i < 8 are.
static inline __m512i qh_interleaved(const uint64_t * qh) {
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    const __m512i words =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    const __m512i rows = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) qh));
    const __m512i h    = _mm512_permutexvar_epi16(words, _mm512_shuffle_epi8(rows, pairs));
    return _mm512_mask_srli_epi16(h, 0xFFFF0000, h, 2);
}

// 16 bytes of rows r .. r + 15, which lie at src in row 0, as four groups of four interleaved rows.
static inline void interleave_groups(const uint8_t * src, size_t stride, int n, int r, __m512i v[4]) {
    for (int i = 0; i < 4; i++) {
        v[i] = load_4(src, stride, n, r + i);
    }
    interleave4(v);
    // quarters: the 4 x 4 transpose, so that each vector is a group
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xEE), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    v[1] = _mm512_shuffle_i32x4(a, b, 0xDD);
    v[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    v[3] = _mm512_shuffle_i32x4(c, d, 0xDD);
}

// Four groups of four rows, from row r on.
TBQ_INLINE void unpack_values_23(int bits, const uint8_t * block, size_t stride, int n, int r, const uint64_t * qh,
                                 __m512i table, uint8_t * panel) {
    __m512i v[4];
    interleave_groups(tbq_qs(block), stride, n, r, v);
    for (int g = 0; g < 4; g++) {
        const __m512i h = bits == 3 ? qh_interleaved(qh + r + 4 * g) : _mm512_setzero_si512();
        for (int j = 0; j < 4; j++) {
            store_values(panel, r / 4 + g, 16 * j, table, index_of(bits, v[g], j, h, (j & 1) | (j >> 1) << 2));
        }
    }
}

static inline void unpack_values_8(const uint8_t * block, size_t stride, int n, int r, uint8_t * panel) {
    for (int quarter = 0; quarter < 4; quarter++) {
        __m512i v[4];
        interleave_groups(tbq_exact_qs(block) + 16 * quarter, stride, n, r, v);
        for (int g = 0; g < 4; g++) {
            _mm512_storeu_si512(panel + ((r / 4 + g) * TBQ_BLOCK + 16 * quarter) * 4, biased(v[g]));
        }
    }
}

TBQ_INLINE void unpack_values(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                              uint8_t * panel) {
    const __m512i table = level_table(bits);
    for (int r = 0; r < TBQ_TILE; r += bits == 4 ? 8 : 16) {
        if (bits == 8) {
            unpack_values_8(block, stride, n, r, panel);
        } else if (bits == 4) {
            unpack_values_4(block, stride, n, r, table, panel);
        } else {
            unpack_values_23(bits, block, stride, n, r, qh, table, panel);
        }
    }
}

static inline void round_weights(const lanes x[4], int16_t * rounded, int32_t * sum) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); // undoes the packs
    const __m512i half  = _mm512_set1_epi16(128);
    __m512i       v[4];
    for (int r = 0; r < 4; r++) {
        v[r] = _mm512_cvtps_epi32(x[r]);
    }
    const __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
    const __m512i low_a = _mm512_and_si512(a, _mm512_set1_epi16(255)),
                  low_b = _mm512_and_si512(b, _mm512_set1_epi16(255));
    const __m512i low   = _mm512_packus_epi16(low_a, low_b);
    const __m512i high  = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                             _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
    _mm512_storeu_si512(rounded, _mm512_permutexvar_epi32(order, high));
    _mm512_storeu_si512(rounded + 32, _mm512_permutexvar_epi32(order, low));
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3])));
}

#define VALUES_AT_ONCE 2

TBQ_INLINE void values_n(int bits, int n, const uint8_t * panel, const int16_t * weights, const int32_t * weight_sums,
                         const float * rescale, const float * factor, float * sum, int64_t sum_stride) {
    __m512i high[VALUES_AT_ONCE][4], low[VALUES_AT_ONCE][4];
    for (int i = 0; i < n; i++) {
        for (int c = 0; c < 4; c++) {
            high[i][c] = _mm512_setzero_si512();
            low[i][c] =
                _mm512_set1_epi32(-(bits == 8 ? TBQ_EXACT_BIAS : 64) * weight_sums[i]); // what the levels' bias adds
        }
    }
    for (int g = 0; g < TBQ_TILE / 4; g++) {
        __m512i v[4];
        for (int c = 0; c < 4; c++) {
            v[c] = _mm512_loadu_si512(panel + (g * TBQ_BLOCK + 16 * c) * 4);
        }
        for (int i = 0; i < n; i++) {
            int32_t word[2];
            memcpy(&word[0], (const int8_t *) (weights + i * TBQ_TILE) + 4 * g, 4);
            memcpy(&word[1], (const int8_t *) (weights + i * TBQ_TILE) + 4 * g + TBQ_TILE, 4);
            for (int c = 0; c < 4; c++) {
                high[i][c] = multiply(bits, high[i][c], v[c], _mm512_set1_epi32(word[0]));
                low[i][c]  = multiply(bits, low[i][c], v[c], _mm512_set1_epi32(word[1]));
            }
        }
    }
    for (int i = 0; i < n; i++) {
        const __m512 f = _mm512_set1_ps(factor[i]);
        for (int c = 0; c < 4; c++) {
            float *       s       = sum + i * sum_stride + 16 * c;
            const __m512i product = _mm512_add_epi32(_mm512_slli_epi32(high[i][c], 8), low[i][c]);
            const __m512  old     = _mm512_mul_ps(_mm512_set1_ps(rescale[i]), _mm512_loadu_ps(s));
            _mm512_storeu_ps(s, _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), f, old));
        }
    }
}

#include "tile.inc"
