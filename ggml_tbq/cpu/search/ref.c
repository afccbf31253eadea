// SPDX-License-Identifier: MIT
// The scalar reference of the search.
#include "../tbq-impl.h"

#include <math.h>

#define TBQ_SEARCH     tbq_search_ref
#define SEARCH_QUERIES 1

#include "tbq-search.h"

// The level of value e of a lane, by way of the block that tbq.h draws.
static int level_at(int bits, const uint32_t * codes, int lane, int e) {
    uint8_t   block[sizeof(block_tbq4_0)] = { 0 };
    const int words                       = tbq_block_words(bits);
    for (int w = 0; w < words; w++) {
        memcpy(block + offsetof(block_tbq4_0, qs) + 4 * w, codes + w * TBQ_SEARCH_GROUP + lane, 4);
    }
    return tbq_codebook(bits)[tbq_index_of(bits, block, e)];
}

static void group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks,
                  const tbq_search_query * q, const float * mul, const float * add, float * scores) {
    const int64_t words = tbq_block_words(bits);
    for (int lane = 0; lane < nq * TBQ_SEARCH_GROUP; lane++) { // nq is 1
        float sum = 0;
        for (int64_t b = 0; b < blocks; b++) {
            int32_t p = 0;
            for (int e = 0; e < TBQ_BLOCK; e++) {
                p += level_at(bits, codes + b * words * TBQ_SEARCH_GROUP, lane, e) * q[b].qs[e];
            }
            const float f = tbq_half_to_float(d[b * TBQ_SEARCH_GROUP + lane]) * q[b].d;
            sum += f * (float) p;
        }
        if (mul) {
            sum *= mul[lane];
        }
        scores[lane] = add ? sum + add[lane] : sum;
    }
}

static int above(const float * scores, float bar) {
    int mask = 0;
    for (int lane = 0; lane < TBQ_SEARCH_GROUP; lane++) {
        mask |= (scores[lane] > bar) << lane;
    }
    return mask;
}

#include "search.inc"
