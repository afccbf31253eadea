// SPDX-License-Identifier: MIT Exhaustive nearest-neighbor search of a flat index of packed vectors: the dot products
// of queries with every vector, and the k vectors with the best scores.
//
//     score(q, x) = mul[x] . <q, x^> + add[x]
//
// x^ is what the vector decodes to.  mul and add hold one float for each vector.  The caller sets them, for example to
// turn dot products into cosines, unbiased estimates or distances.
//
// LAYOUT
//
// Sixteen vectors are a group, and each has a lane of a vector register: no sums across lanes are needed.  Vector v is
// lane v % 16 of group v / 16.  A vector has `blocks` blocks (tbq.h) of one type.
//
//     d[group][block][16]             the scales, IEEE halves
//     codes[group][block][word][16]   the rest of the block as 32-bit little-endian words: 4, 6 or 8 of them
//
// These are the bytes of the rows in another order.  The last group may be partly filled: memory for its other lanes,
// in mul and add too, must exist, but its contents do not matter.  codes is aligned to 4 bytes; with 64 it is faster.
//
// EXACTNESS
//
// Queries are rotated and rounded to 8 bits in blocks of 64, as TBQ_TYPE_TBQ8_ACT.  The sum within a block is an exact
// integer, and the sums of the blocks are added in order as floats, so every implementation returns the same bits.
//
// The rounding of a query adds about 0.5 % to the mean squared error of 4-bit vectors.
#pragma once

#include "tbq.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TBQ_SEARCH_GROUP 16

// A block of a query, rotated: value i is d . qs[i].  The array of a query is `blocks` of these.
typedef struct {
    float   d;
    int32_t bias; // -64 times the sum of qs, for kernels that multiply with levels + 64
    int8_t  qs[TBQ_BLOCK];
} tbq_search_query;
TBQ_STATIC_ASSERT(sizeof(tbq_search_query) == 72, "tbq_search_query size");

typedef struct {
    tbq_type         type;
    int64_t          blocks; // of a vector, at least 1
    int64_t          n;      // vectors
    const uint16_t * d;
    const uint32_t * codes;
    const float *    mul; // NULL: 1
    const float *    add; // NULL: 0
} tbq_search_rows;

// The 32-bit words of a block without d: 4, 6 or 8; 0 for a type that is not tbq2_0, tbq3_0 or tbq4_0.
TBQ_API int32_t tbq_search_words(tbq_type type);

// rows: n vectors as tbq_quantize wrote them; they become vectors first .. first + n - 1.
TBQ_API tbq_status tbq_search_put(tbq_type type, int64_t blocks, const void * rows, int64_t first, int64_t n,
                                  uint16_t * d, uint32_t * codes);

// The inverse: the vectors at n positions, which must exist, to rows.
TBQ_API tbq_status tbq_search_get(tbq_type type, int64_t blocks, const uint16_t * d, const uint32_t * codes,
                                  const int64_t * positions, int64_t n, void * rows);

// Queries for tbq_search.  src: n floats, n a multiple of 64.  dst: n / 64 blocks.
TBQ_API tbq_status tbq_search_prepare(const float * src, tbq_search_query * dst, int64_t n);

// The best k of vectors first .. last - 1 for each of n_queries prepared queries, k >= 1.  first is a multiple of 16,
// or the result is TBQ_ERROR_LENGTH.  scores and positions: n_queries x k, the highest score first, and of equal scores
// the lowest position first.  Vectors whose score is NaN or -Inf are not found; where fewer than k are found, -Inf and
// -1 follow.  To use threads, give each of them some of the queries or a range of the vectors.
TBQ_API tbq_status tbq_search(const tbq_search_rows * rows, int64_t first, int64_t last,
                              const tbq_search_query * queries, int64_t n_queries, int64_t k, float * scores,
                              int64_t * positions);

#ifdef __cplusplus
}
#endif
