// SPDX-License-Identifier: MIT
// The search with AVX-512 F, BW, DQ and VL: a group is a vector.  avx512vnni.c compiles this file again with VNNI.
#include "../tbq-impl.h"
#include "../tbq-dot4.h"

#include <immintrin.h>
#include <math.h>

#ifdef __AVX512VNNI__
#define TBQ_SEARCH tbq_search_avx512vnni
#else
#define TBQ_SEARCH tbq_search_avx512
#endif
#define SEARCH_QUERIES 8

#include "tbq-search.h"

// Independent sums of a query, so that a product does not wait for the one before.
#define CHAINS(nq) ((nq) == 1 ? 4 : (nq) == 2 ? 2 : 1)

static inline __m512i word_of(const tbq_search_query * q, int w) {
    int32_t bytes;
    memcpy(&bytes, q->qs + 4 * w, 4);
    return _mm512_set1_epi32(bytes);
}

// Adds the products of the nibbles, which are indices: low nibbles with word w of each query, high nibbles with word w
// + 8.
TBQ_INLINE void dot_nibbles(__m512i table, __m512i x, int nq, const tbq_search_query * q, int64_t blocks, int w,
                            __m512i * p) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i lo     = _mm512_shuffle_epi8(table, _mm512_and_si512(x, nibble));
    const __m512i hi     = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble));
    const int     chains = CHAINS(nq);
    for (int i = 0; i < nq; i++) {
        __m512i * a = p + i * chains + 2 * w % chains;
        __m512i * b = p + i * chains + (2 * w + 1) % chains;
        *a          = dot4_512(*a, lo, word_of(q + i * blocks, w));
        *b          = dot4_512(*b, hi, word_of(q + i * blocks, w + 8));
    }
}

#define LOAD(w) _mm512_loadu_si512(codes + (w) * TBQ_SEARCH_GROUP)

// The indices of words w and w + 8 of 16 (four elements each), in the low and the high nibbles.
TBQ_INLINE __m512i nibbles(int bits, const uint32_t * codes, int w) {
    if (bits == 4) {
        return LOAD(w);
    }
    __m512i x = _mm512_and_si512(_mm512_srli_epi16(LOAD(w & 3), 2 * (w >> 2)),
                                 _mm512_set1_epi8(0x33)); // j = e / 16 is w >> 2, and 2 on
    if (bits == 3) {
        const __m512i high = _mm512_srli_epi16(LOAD(4 + (w & 1)), (w & 2) + (w >> 2));
        x                  = _mm512_or_si512(x, _mm512_slli_epi16(_mm512_and_si512(high, _mm512_set1_epi8(0x11)), 2));
    }
    return x;
}

TBQ_INLINE void group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                      const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    const __m128i levels = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    const __m512i table  = _mm512_broadcast_i32x4(_mm_add_epi8(levels, _mm_set1_epi8(64)));
    const int     chains = CHAINS(nq);
    __m512        sum[SEARCH_QUERIES];
    for (int i = 0; i < nq; i++) {
        sum[i] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b++) {
        __m512i p[SEARCH_QUERIES];
        for (int i = 0; i < nq * chains; i++) {
            p[i] = i % chains ? _mm512_setzero_si512() : _mm512_set1_epi32(q[i / chains * blocks + b].bias);
        }
#define STEP(w) dot_nibbles(table, nibbles(bits, codes, w), nq, q + b, blocks, w, p);
        TBQ_EACH_OF_8(STEP)
#undef STEP
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) d));
        for (int i = 0; i < nq; i++) {
            __m512i total = p[i * chains];
            for (int c = 1; c < chains; c++) {
                total = _mm512_add_epi32(total, p[i * chains + c]);
            }
            const __m512 f = _mm512_mul_ps(scale, _mm512_set1_ps(q[i * blocks + b].d));
            sum[i]         = _mm512_add_ps(sum[i], _mm512_mul_ps(f, _mm512_cvtepi32_ps(total)));
        }
        codes += tbq_block_words(bits) * TBQ_SEARCH_GROUP;
        d += TBQ_SEARCH_GROUP;
    }
    for (int i = 0; i < nq; i++) {
        sum[i] = mul ? _mm512_mul_ps(sum[i], _mm512_loadu_ps(mul)) : sum[i];
        _mm512_storeu_ps(scores + i * TBQ_SEARCH_GROUP, add ? _mm512_add_ps(sum[i], _mm512_loadu_ps(add)) : sum[i]);
    }
}

static inline int above(const float * scores, float bar) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), _mm512_set1_ps(bar), _CMP_GT_OQ);
}

#include "search.inc"
