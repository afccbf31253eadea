// SPDX-License-Identifier: MIT
// The search with NEON: a group is four vectors of four lanes.  neon-dotprod.c compiles this file again with the
// dot product instructions.
#include "../tbq-impl.h"
#include "../tbq-dot4.h"

#include <arm_neon.h>
#include <math.h>

#ifdef __ARM_FEATURE_DOTPROD
#define TBQ_SEARCH tbq_search_neon_dotprod
#else
#define TBQ_SEARCH tbq_search_neon
#endif
#define SEARCH_QUERIES 8

#include "tbq-search.h"

static inline int8x16_t word_of(const tbq_search_query * q, int w) {
    int32_t bytes;
    memcpy(&bytes, q->qs + 4 * w, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
}

// Adds the products of the nibbles, which are indices: low nibbles with word w of each query, high nibbles with word w
// + 8.
TBQ_INLINE void dot_nibbles(int8x16_t table, uint8x16_t x, int nq, const tbq_search_query * q, int64_t blocks, int w,
                            int32x4_t * p) {
    const int8x16_t lo = vqtbl1q_s8(table, vandq_u8(x, vdupq_n_u8(15)));
    const int8x16_t hi = vqtbl1q_s8(table, vshrq_n_u8(x, 4));
    for (int i = 0; i < nq; i++) {
        p[i] = dot4(p[i], lo, word_of(q + i * blocks, w));
        p[i] = dot4(p[i], hi, word_of(q + i * blocks, w + 8));
    }
}

#define LOAD(w)     vld1q_u8((const uint8_t *) (codes + (w) * TBQ_SEARCH_GROUP))
#define SHIFT(x, n) vshlq_u8(x, vdupq_n_s8((int8_t) (n))) // to the right where n < 0

// The indices of words w and w + 8 of 16 (four elements each), in the low and the high nibbles.
TBQ_INLINE uint8x16_t nibbles(int bits, const uint32_t * codes, int w) {
    if (bits == 4) {
        return LOAD(w);
    }
    uint8x16_t x = vandq_u8(SHIFT(LOAD(w & 3), -2 * (w >> 2)), vdupq_n_u8(0x33)); // j = e / 16 is w >> 2, and 2 on
    if (bits == 3) {
        const uint8x16_t high = SHIFT(LOAD(4 + (w & 1)), -((w & 2) + (w >> 2)));
        x                     = vorrq_u8(x, vshlq_n_u8(vandq_u8(high, vdupq_n_u8(0x11)), 2));
    }
    return x;
}

TBQ_INLINE void quarter_group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                              const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    const int8x16_t table = vld1q_s8(tbq_lookup_table(bits)->all);
    float32x4_t     sum[SEARCH_QUERIES];
    for (int i = 0; i < nq; i++) {
        sum[i] = vdupq_n_f32(0);
    }
    for (int64_t b = 0; b < blocks; b++) {
        int32x4_t p[SEARCH_QUERIES];
        for (int i = 0; i < nq; i++) {
            p[i] = vdupq_n_s32(0);
        }
#define STEP(w) dot_nibbles(table, nibbles(bits, codes, w), nq, q + b, blocks, w, p);
        TBQ_EACH_OF_8(STEP)
#undef STEP
        const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(d)));
        for (int i = 0; i < nq; i++) {
            const float32x4_t f = vmulq_f32(scale, vdupq_n_f32(q[i * blocks + b].d));
            sum[i]              = vaddq_f32(sum[i], vmulq_f32(f, vcvtq_f32_s32(p[i])));
        }
        codes += tbq_block_words(bits) * TBQ_SEARCH_GROUP;
        d += TBQ_SEARCH_GROUP;
    }
    for (int i = 0; i < nq; i++) {
        sum[i] = mul ? vmulq_f32(sum[i], vld1q_f32(mul)) : sum[i];
        vst1q_f32(scores + i * TBQ_SEARCH_GROUP, add ? vaddq_f32(sum[i], vld1q_f32(add)) : sum[i]);
    }
}

TBQ_INLINE void group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                      const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    for (int v = 0; v < TBQ_SEARCH_GROUP; v += 4) {
        quarter_group(bits, nq, d + v, codes + v, blocks, q, mul ? mul + v : NULL, add ? add + v : NULL, scores + v);
    }
}

static inline int above(const float * scores, float bar) {
    static const uint32_t bits[4] = { 1, 2, 4, 8 };
    const uint32x4_t      weight  = vld1q_u32(bits);
    int                   mask    = 0;
    for (int v = 0; v < TBQ_SEARCH_GROUP; v += 4) {
        mask |= (int) vaddvq_u32(vandq_u32(vcgtq_f32(vld1q_f32(scores + v), vdupq_n_f32(bar)), weight)) << v;
    }
    return mask;
}

#include "search.inc"
