// SPDX-License-Identifier: MIT
// The search with AVX2 and F16C: a group is two vectors of eight lanes.
#include "../tbq-impl.h"
#include "../tbq-x86.h"

#define TBQ_SEARCH     tbq_search_avx2
#define SEARCH_QUERIES 4

#include "tbq-search.h"

static inline __m256i word_of(const tbq_search_query * q, int w) {
    int32_t bytes;
    memcpy(&bytes, q->qs + 4 * w, 4);
    return _mm256_set1_epi32(bytes);
}

// Adds the products of the nibbles, which are indices: low nibbles with word w of each query, high nibbles with word w
// + 8.
TBQ_INLINE void dot_nibbles(__m256i table, __m256i x, int nq, const tbq_search_query * q, int64_t blocks, int w,
                            __m256i * p) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i lo     = _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble));
    const __m256i hi     = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
    for (int i = 0; i < nq; i++) {
        p[i] = dot4(p[i], lo, word_of(q + i * blocks, w));
        p[i] = dot4(p[i], hi, word_of(q + i * blocks, w + 8));
    }
}

#define LOAD(w) _mm256_loadu_si256((const __m256i *) (codes + (w) * TBQ_SEARCH_GROUP))

// The indices of words w and w + 8 of 16 (four elements each), in the low and the high nibbles.
TBQ_INLINE __m256i nibbles(int bits, const uint32_t * codes, int w) {
    if (bits == 4) {
        return LOAD(w);
    }
    __m256i x = _mm256_and_si256(_mm256_srli_epi16(LOAD(w & 3), 2 * (w >> 2)),
                                 _mm256_set1_epi8(0x33)); // j = e / 16 is w >> 2, and 2 on
    if (bits == 3) {
        const __m256i high = _mm256_srli_epi16(LOAD(4 + (w & 1)), (w & 2) + (w >> 2));
        x                  = _mm256_or_si256(x, _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(0x11)), 2));
    }
    return x;
}

TBQ_INLINE void half_group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                           const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    const __m128i levels = _mm_loadu_si128((const __m128i *) tbq_lookup_table(bits)->all);
    const __m256i table  = _mm256_broadcastsi128_si256(_mm_add_epi8(levels, _mm_set1_epi8(64)));
    __m256        sum[SEARCH_QUERIES];
    for (int i = 0; i < nq; i++) {
        sum[i] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b++) {
        __m256i p[SEARCH_QUERIES];
        for (int i = 0; i < nq; i++) {
            p[i] = _mm256_set1_epi32(q[i * blocks + b].bias);
        }
#define STEP(w) dot_nibbles(table, nibbles(bits, codes, w), nq, q + b, blocks, w, p);
        TBQ_EACH_OF_8(STEP)
#undef STEP
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) d));
        for (int i = 0; i < nq; i++) {
            const __m256 f = _mm256_mul_ps(scale, _mm256_set1_ps(q[i * blocks + b].d));
            sum[i]         = _mm256_add_ps(sum[i], _mm256_mul_ps(f, _mm256_cvtepi32_ps(p[i])));
        }
        codes += tbq_block_words(bits) * TBQ_SEARCH_GROUP;
        d += TBQ_SEARCH_GROUP;
    }
    for (int i = 0; i < nq; i++) {
        sum[i] = mul ? _mm256_mul_ps(sum[i], _mm256_loadu_ps(mul)) : sum[i];
        _mm256_storeu_ps(scores + i * TBQ_SEARCH_GROUP, add ? _mm256_add_ps(sum[i], _mm256_loadu_ps(add)) : sum[i]);
    }
}

TBQ_INLINE void group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                      const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    half_group(bits, nq, d, codes, blocks, q, mul, add, scores);
    half_group(bits, nq, d + 8, codes + 8, blocks, q, mul ? mul + 8 : NULL, add ? add + 8 : NULL, scores + 8);
}

static inline int above(const float * scores, float bar) {
    const __m256 b = _mm256_set1_ps(bar);
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores), b, _CMP_GT_OQ)) |
           _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores + 8), b, _CMP_GT_OQ)) << 8;
}

#include "search.inc"
