// SPDX-License-Identifier: MIT
// Attention with NEON (AArch64).  neon-dotprod.c compiles this file again with the dot product
// instructions.
#include "attention.h"
#include "../tbq-dot4.h"

#include <arm_neon.h>
#include <math.h>

#ifdef __ARM_FEATURE_DOTPROD
#define TBQ_ATTENTION tbq_attention_neon_dotprod
#else
#define TBQ_ATTENTION tbq_attention_neon
#endif

typedef struct {
    float32x4_t v[4];
} lanes;

#define FOR_QUARTERS for (int i = 0; i < 4; i++)

static inline lanes lanes_load(const float * p) {
    lanes r;
    FOR_QUARTERS r.v[i] = vld1q_f32(p + 4 * i);
    return r;
}

static inline void lanes_store(float * p, lanes a) {
    FOR_QUARTERS vst1q_f32(p + 4 * i, a.v[i]);
}

static inline lanes lanes_set(float x) {
    lanes r;
    FOR_QUARTERS r.v[i] = vdupq_n_f32(x);
    return r;
}

#define DEFINE(name)                                          \
    static inline lanes lanes_##name(lanes a, lanes b) {      \
        FOR_QUARTERS a.v[i] = v##name##q_f32(a.v[i], b.v[i]); \
        return a;                                             \
    }
DEFINE(add)
DEFINE(sub)
DEFINE(mul)
DEFINE(div)
DEFINE(max)
#undef DEFINE

static inline lanes lanes_abs(lanes a) {
    FOR_QUARTERS a.v[i] = vabsq_f32(a.v[i]);
    return a;
}

static inline lanes lanes_fma(lanes a, lanes b, lanes c) {
    FOR_QUARTERS c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}

static inline lanes lanes_halves(const uint16_t * h) {
    lanes r;
    FOR_QUARTERS r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + 4 * i)));
    return r;
}

static inline lanes lanes_bytes(const int8_t * b) {
    const int8x16_t q    = vld1q_s8(b);
    const int16x8_t h[2] = { vmovl_s8(vget_low_s8(q)), vmovl_high_s8(q) };
    lanes           r;
    FOR_QUARTERS r.v[i] = vcvtq_f32_s32(i & 1 ? vmovl_high_s16(h[i / 2]) : vmovl_s16(vget_low_s16(h[i / 2])));
    return r;
}

static inline lanes lanes_power(lanes n) {
    FOR_QUARTERS n.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
    return n;
}

static inline lanes lanes_pick(lanes x, lanes limit, lanes a, lanes b) {
    FOR_QUARTERS b.v[i] = vbslq_f32(vcgtq_f32(x.v[i], limit.v[i]), a.v[i], b.v[i]);
    return b;
}

// A bit for each quarter: whether there is one at all is what counts.
static inline unsigned lanes_unbounded(lanes x) {
    const float32x4_t inf = vdupq_n_f32(INFINITY);
    unsigned          r   = 0;
    FOR_QUARTERS r |= (unsigned) (vminvq_u32(vcltq_f32(x.v[i], inf)) == 0) << i;
    return r;
}

static inline float lanes_sum(lanes x) {
    const float32x4_t a = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3])); // 8 apart, then 4
    const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
}

static inline float lanes_reduce_max(lanes x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}

static inline int8x16_t broadcast4(const int8_t * p) {
    int32_t word;
    memcpy(&word, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// Each byte of v moved down by n bits, or up by -n.
static inline uint8x16_t shift_down(uint8x16_t v, int n) {
    return vshlq_u8(v, vdupq_n_s8((int8_t) -n));
}

// The indices at bits 2 j of low, with bit `bit` of high above them at 3 bits.
TBQ_INLINE uint8x16_t index_of(int bits, uint8x16_t low, int j, uint8x16_t high, int bit) {
    const uint8x16_t pair = vandq_u8(shift_down(low, 2 * j), vdupq_n_u8(3));
    return bits == 2 ? pair : vorrq_u8(pair, vandq_u8(shift_down(high, bit - 2), vdupq_n_u8(4)));
}

TBQ_INLINE int8x16_t level_table(int bits) {
    return vld1q_s8(tbq_lookup_table(bits)->all);
}

// --- keys -------------------------------------------------------------------------------------------------------
//
// The panel: 16 x 64 x 4 bytes, levels of elements 4 j .. 4 j + 3 of row r at [j][r].

static inline void store_keys(uint8_t * panel, int j, int r, int8x16_t table, uint8x16_t index) {
    vst1q_s8((int8_t *) panel + (j * TBQ_TILE + r) * 4, vqtbl1q_s8(table, index));
}

// 16 bytes of rows r .. r + 3, which lie at src in row 0, word by word.
static inline void packed_words(const uint8_t * src, size_t stride, int n, int r, uint8x16_t w[4]) {
    uint32x4_t v[4];
    FOR_QUARTERS v[i]  = vreinterpretq_u32_u8(vld1q_u8(row_of(src, stride, n, r + i)));
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(v[0], v[1])),
                     b = vreinterpretq_u64_u32(vtrn2q_u32(v[0], v[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(v[2], v[3])),
                     d = vreinterpretq_u64_u32(vtrn2q_u32(v[2], v[3]));
    w[0]               = vreinterpretq_u8_u64(vtrn1q_u64(a, c));
    w[1]               = vreinterpretq_u8_u64(vtrn1q_u64(b, d));
    w[2]               = vreinterpretq_u8_u64(vtrn2q_u64(a, c));
    w[3]               = vreinterpretq_u8_u64(vtrn2q_u64(b, d));
}

TBQ_INLINE void unpack_keys(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                            uint8_t * panel) {
    const int8x16_t table = level_table(bits);
    for (int r = 0; r < TBQ_TILE; r += 4) {
        uint8x16_t w[4];
        if (bits == 8) {
            for (int quarter = 0; quarter < 4; quarter++) {
                packed_words(tbq_exact_qs(block) + 16 * quarter, stride, n, r, w);
                FOR_QUARTERS vst1q_u8(panel + ((4 * quarter + i) * TBQ_TILE + r) * 4, w[i]);
            }
            continue;
        }
        if (bits == 4) {
            for (int half = 0; half < 2; half++) {
                packed_words(tbq_qs(block) + 16 * half, stride, n, r, w);
                FOR_QUARTERS {
                    store_keys(panel, 4 * half + i, r, table, vandq_u8(w[i], vdupq_n_u8(15)));
                    store_keys(panel, 4 * half + i + 8, r, table, vshrq_n_u8(w[i], 4));
                }
            }
            continue;
        }
        packed_words(tbq_qs(block), stride, n, r, w);
        uint32x4x2_t h = { { vdupq_n_u32(0), vdupq_n_u32(0) } };
        if (bits == 3) {
            h = vld2q_u32((const uint32_t *) (qh + r)); // words 0 and 1 of four rows
        }
        FOR_QUARTERS {
            for (int j = 0; j < 4; j++) {
                const int bit = (j & 1) | (i >> 1) << 1 | (j >> 1) << 2; // tbq.h has the order
                store_keys(panel, 4 * j + i, r, table,
                           index_of(bits, w[i], j, vreinterpretq_u8_u32(h.val[i & 1]), bit));
            }
        }
    }
}

// Sixteen rows by n queries.
TBQ_INLINE void keys_16(int n, const uint8_t * panel, const float * scales, const query_block * q, int64_t q_stride,
                        int add, float * logits) {
    int32x4_t acc[KEYS_AT_ONCE][4];
    for (int m = 0; m < n; m++) {
        FOR_QUARTERS acc[m][i] = vdupq_n_s32(0);
    }
    for (int j = 0; j < 16; j++) {
        int8x16_t k[4];
        FOR_QUARTERS k[i] = vld1q_s8((const int8_t *) panel + (j * TBQ_TILE + 4 * i) * 4);
        for (int m = 0; m < n; m++) {
            const int8x16_t four   = broadcast4(q[m * q_stride].qs + 4 * j);
            FOR_QUARTERS acc[m][i] = dot4(acc[m][i], k[i], four);
        }
    }
    for (int m = 0; m < n; m++) {
        const float32x4_t d = vdupq_n_f32(q[m * q_stride].d);
        FOR_QUARTERS {
            float *           s   = logits + m * TBQ_TILE + 4 * i;
            const float32x4_t old = add ? vld1q_f32(s) : vdupq_n_f32(0.0f);
            vst1q_f32(s, vfmaq_f32(old, vmulq_f32(vld1q_f32(scales + 4 * i), vcvtq_f32_s32(acc[m][i])), d));
        }
    }
}

TBQ_INLINE void keys_n(int bits, int n, const uint8_t * panel, const float * scales, const query_block * q,
                       int64_t q_stride, int add, float * logits) {
    (void) bits; // the bytes are signed
    for (int r = 0; r < TBQ_TILE; r += 16) {
        keys_16(n, panel + 4 * r, scales + r, q, q_stride, add, logits + r);
    }
}

// --- values -----------------------------------------------------------------------------------------------------
//
// The panel: 16 x 64 x 4 bytes, levels of element c of rows 4 g .. 4 g + 3 at [g][c]: what a store that interleaves
// makes of four rows.  Weights are two planes of 64 signed bytes, high and low.

static inline void store_values(uint8_t * panel, int group, int c, int8x16_t table, const uint8x16_t index[4]) {
    int8x16x4_t v;
    FOR_QUARTERS v.val[i] = vqtbl1q_s8(table, index[i]);
    vst4q_s8((int8_t *) panel + (group * TBQ_BLOCK + c) * 4, v);
}

TBQ_INLINE void unpack_values(int bits, const uint8_t * block, size_t stride, int n, const uint64_t * qh,
                              uint8_t * panel) {
    const int8x16_t table = level_table(bits);
    for (int r = 0; r < TBQ_TILE; r += 4) {
        uint8x16_t v[4], h[4], index[4];
        if (bits == 8) {
            for (int c = 0; c < TBQ_BLOCK; c += 16) {
                uint8x16x4_t rows;
                FOR_QUARTERS rows.val[i] = vld1q_u8(tbq_exact_qs(row_of(block, stride, n, r + i)) + c);
                vst4q_u8(panel + (r / 4 * TBQ_BLOCK + c) * 4, rows);
            }
            continue;
        }
        for (int half = 0; half < (bits == 4 ? 2 : 1); half++) {
            FOR_QUARTERS v[i] = vld1q_u8(tbq_qs(row_of(block, stride, n, r + i)) + 16 * half);
            if (bits == 4) {
                FOR_QUARTERS index[i] = vandq_u8(v[i], vdupq_n_u8(15));
                store_values(panel, r / 4, 16 * half, table, index);
                FOR_QUARTERS index[i] = vshrq_n_u8(v[i], 4);
                store_values(panel, r / 4, 16 * half + 32, table, index);
            }
        }
        if (bits == 4) {
            continue;
        }
        FOR_QUARTERS { // for i >= 8 two bits lower, where those of i < 8 are
            const uint8x8_t t = vcreate_u8(qh[r + i]);
            h[i]              = vcombine_u8(t, vshr_n_u8(t, 2));
        }
        for (int j = 0; j < 4; j++) {
            FOR_QUARTERS index[i] = index_of(bits, v[i], j, h[i], (j & 1) | (j >> 1) << 2);
            store_values(panel, r / 4, 16 * j, table, index);
        }
    }
}

static inline void round_weights(const lanes x[4], int16_t * rounded, int32_t * sum) {
    int8_t * planes = (int8_t *) rounded;
    (void) sum;
    for (int r = 0; r < 4; r++) {
        int16x8_t v[2];
        for (int i = 0; i < 2; i++) {
            v[i] = vmovn_high_s32(vmovn_s32(vcvtnq_s32_f32(x[r].v[2 * i])), vcvtnq_s32_f32(x[r].v[2 * i + 1]));
        }
        vst1q_s8(planes + TBQ_TILE + 16 * r, vmovn_high_s16(vmovn_s16(v[0]), v[1]));
        const int16x8_t half = vdupq_n_s16(128);
        vst1q_s8(planes + 16 * r, vshrn_high_n_s16(vshrn_n_s16(vaddq_s16(v[0], half), 8), vaddq_s16(v[1], half), 8));
    }
}

#define VALUES_AT_ONCE 2

// Sixteen channels by n queries.
TBQ_INLINE void values_16(int n, const uint8_t * panel, const int16_t * weights, const float * rescale,
                          const float * factor, float * sum, int64_t sum_stride) {
    int32x4_t high[VALUES_AT_ONCE][4], low[VALUES_AT_ONCE][4];
    for (int m = 0; m < n; m++) {
        FOR_QUARTERS high[m][i] = low[m][i] = vdupq_n_s32(0);
    }
    for (int g = 0; g < TBQ_TILE / 4; g++) {
        int8x16_t v[4];
        FOR_QUARTERS v[i] = vld1q_s8((const int8_t *) panel + (g * TBQ_BLOCK + 4 * i) * 4);
        for (int m = 0; m < n; m++) {
            const int8_t *  planes = (const int8_t *) (weights + m * TBQ_TILE);
            const int8x16_t h = broadcast4(planes + 4 * g), l = broadcast4(planes + TBQ_TILE + 4 * g);
            FOR_QUARTERS {
                high[m][i] = dot4(high[m][i], v[i], h);
                low[m][i]  = dot4(low[m][i], v[i], l);
            }
        }
    }
    for (int m = 0; m < n; m++) {
        const float32x4_t f = vdupq_n_f32(factor[m]);
        FOR_QUARTERS {
            float *           s       = sum + m * sum_stride + 4 * i;
            const int32x4_t   product = vaddq_s32(vshlq_n_s32(high[m][i], 8), low[m][i]);
            const float32x4_t old     = vmulq_f32(vdupq_n_f32(rescale[m]), vld1q_f32(s));
            vst1q_f32(s, vfmaq_f32(old, vcvtq_f32_s32(product), f));
        }
    }
}

TBQ_INLINE void values_n(int bits, int n, const uint8_t * panel, const int16_t * weights, const int32_t * weight_sums,
                         const float * rescale, const float * factor, float * sum, int64_t sum_stride) {
    (void) bits, (void) weight_sums; // the levels are not biased
    for (int c = 0; c < TBQ_BLOCK; c += 16) {
        values_16(n, panel + 4 * c, weights, rescale, factor, sum + c, sum_stride);
    }
}

#include "tile.inc"
