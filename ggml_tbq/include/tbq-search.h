// SPDX-License-Identifier: MIT
// Nearest-neighbour search over packed vectors: dot products of queries with every row, and the best k of them.
//
//     score(q, x) = mul[x] . <q, x^> + add[x]
//
// x^ is what the row decodes to.  mul and add, a float of each per vector, make lengths, unbiased estimates and distances
// of it: the caller's affair.
//
// LAYOUT
//
// Sixteen vectors side by side, a group, so that each lane of a vector register has one of its own and no sums across
// lanes are needed.  Vector v is lane v % 16 of group v / 16.  A vector is `blocks` blocks (tbq.h) of one type.
//
//     d[group][block][16]             the scales, IEEE halves
//     codes[group][block][word][16]   the rest of the block as 32-bit little-endian words: 4, 6 or 8 of them
//
// which has the bytes of the rows, in another order.  The last group may be partly filled; its other lanes, and theirs of
// mul and add, exist all the same, but what they hold does not matter.  codes are aligned to 4 bytes; to 64 is faster.
//
// EXACTNESS
//
// Queries are rotated and rounded to 8 bits in blocks of 64, as TBQ_TYPE_TBQ8_ACT: the sum within a block is an exact
// integer, those of the blocks are added in order as floats.  Every implementation returns the same bits.
//
// The rounding of a query adds some 0.5 % to the mean square error of 4-bit rows.
#pragma once

#include "tbq.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TBQ_SEARCH_GROUP 16

// A block of a query, rotated: value i is d . qs[i].
typedef struct {
    float   d;
    int32_t bias; // -64 times the sum of qs, for kernels that multiply with levels + 64
    int8_t  qs[TBQ_BLOCK];
} tbq_scan_query;
TBQ_STATIC_ASSERT(sizeof(tbq_scan_query) == 72, "tbq_scan_query size");

typedef struct {
    tbq_type         type;
    int64_t          blocks; // of a vector, at least 1
    int64_t          n;      // vectors
    const uint16_t * d;
    const uint32_t * codes;
    const float *    mul;    // NULL: 1
    const float *    add;    // NULL: 0
} tbq_scan_rows;

// Words of a block: 4, 6 or 8; 0 for another type.
TBQ_API int32_t tbq_scan_words(tbq_type type);

// rows: n vectors as tbq_quantize wrote them, which become vectors first .. first + n - 1.
TBQ_API tbq_status tbq_scan_put(tbq_type type, int64_t blocks, const void * rows, int64_t first, int64_t n, uint16_t * d,
                                uint32_t * codes);

// The inverse, for the vectors at n positions, which must exist.
TBQ_API tbq_status tbq_scan_get(tbq_type type, int64_t blocks, const uint16_t * d, const uint32_t * codes,
                                const int64_t * positions, int64_t n, void * rows);

// src: n values, n a multiple of 64.  dst: n / 64 blocks.
TBQ_API tbq_status tbq_scan_prepare(const float * src, tbq_scan_query * dst, int64_t n);

// The best k of vectors first .. last - 1 for each of n_queries prepared queries, `blocks` blocks each.  first is a
// multiple of 16 (TBQ_ERROR_LENGTH).  scores, positions: n_queries x k, the highest score first, of equal ones the
// lowest position.  Where there are fewer than k, or scores are NaN or -Inf: -Inf and -1.  k >= 1.
// For threads: give each some queries or a range of the vectors.
TBQ_API tbq_status tbq_scan_search(const tbq_scan_rows * rows, int64_t first, int64_t last, const tbq_scan_query * queries,
                                   int64_t n_queries, int64_t k, float * scores, int64_t * positions);

#ifdef __cplusplus
}
#endif
