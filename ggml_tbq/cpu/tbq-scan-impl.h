// SPDX-License-Identifier: MIT
// The search, from the pieces that each instruction set defines; included once, at the end of each implementation file.
// Here is what every implementation must do in the same way: the order of the work, and the k best.
//
// The file that includes this defines TBQ_SCAN (the symbol), SCAN_QUERIES (1, 2, 4 or 8: queries at once, for which
// codes are unpacked once) and
//
//   void group(int bits, int nq, const uint16_t * d, const uint32_t * codes, int64_t blocks, const tbq_scan_query * q,
//              const float * mul, const float * add, float * scores)
//       scores[i][lane] = (mul[lane] . sum over blocks, in order, of (d . d_q) . (float) p) + add[lane], each operation
//       rounded by itself, of nq queries (a constant), `blocks` blocks each; mul or add may be NULL
//   int above(const float * scores, float bar)
//       bit lane set: scores[lane] > bar, of a group
#include "tbq-scan.h"

// Codes that a pass over a batch of queries leaves in the second-level cache for the next.
enum { SCAN_TILE_BYTES = 1 << 17 };

// The k best as a heap whose root is the worst of them: the lowest score and, of equal ones, the highest position.
static inline int is_worse(float score_a, int64_t a, float score_b, int64_t b) {
    return score_a < score_b || (score_a == score_b && a > b);
}

// Puts an entry where the root was, in a heap of n.
static inline void sift(float * scores, int64_t * positions, int64_t n, float score, int64_t position) {
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
        if (child + 1 < n && is_worse(scores[child + 1], positions[child + 1], scores[child], positions[child])) {
            child++;
        }
        if (!is_worse(scores[child], positions[child], score, position)) {
            break;
        }
        scores[at]    = scores[child];
        positions[at] = positions[child];
        at            = child;
    }
    scores[at]    = score;
    positions[at] = position;
}

// Takes the worst off, one by one: what remains is the best first.
static inline void sort_best_first(float * scores, int64_t * positions, int64_t k) {
    for (int64_t n = k - 1; n > 0; n--) {
        const float   score    = scores[n];
        const int64_t position = positions[n];
        scores[n]    = scores[0];
        positions[n] = positions[0];
        sift(scores, positions, n, score, position);
    }
}

static inline void keep_best(const float * scores, int lanes, int64_t position, int64_t k, float * best, int64_t * at) {
    // an empty place is -Inf at -1, which every score beats that is above it, and nothing else does
    for (int mask = above(scores, best[0]) & lanes; mask; mask &= mask - 1) {
        const int lane = TBQ_COUNT_TRAILING_ZEROS((unsigned) mask);
        if (scores[lane] > best[0]) {
            sift(best, at, k, scores[lane], position + lane);
        }
    }
}

// nq queries with the groups first .. last - 1; `vectors` is the end of what counts.
TBQ_INLINE void scan_groups(int bits, int nq, const tbq_scan_rows * rows, int64_t first, int64_t last, int64_t vectors,
                            const tbq_scan_query * q, int64_t k, float * best, int64_t * at) {
    const int64_t words = rows->blocks * tbq_block_words(bits);
    for (int64_t g = first; g < last; g++) {
        float         scores[SCAN_QUERIES * TBQ_SCAN_GROUP];
        const int64_t v     = g * TBQ_SCAN_GROUP;
        const int     lanes = vectors - v < TBQ_SCAN_GROUP ? (1 << (vectors - v)) - 1 : 0xFFFF;
        group(bits, nq, rows->d + v * rows->blocks, rows->codes + v * words, rows->blocks, q, rows->mul ? rows->mul + v : NULL,
              rows->add ? rows->add + v : NULL, scores);
        for (int i = 0; i < nq; i++) {
            keep_best(scores + i * TBQ_SCAN_GROUP, lanes, v, k, best + i * k, at + i * k);
        }
    }
}

TBQ_INLINE void search_rows(int bits, const tbq_scan_rows * rows, int64_t first, int64_t last, const tbq_scan_query * queries,
                            int64_t n_queries, int64_t k, float * scores, int64_t * positions) {
    for (int64_t i = 0; i < n_queries * k; i++) {
        scores[i]    = -INFINITY;
        positions[i] = -1;
    }
    const int64_t group_bytes = TBQ_SCAN_GROUP * rows->blocks * (int64_t) tbq_block_bytes(bits);
    const int64_t tile        = group_bytes < SCAN_TILE_BYTES ? SCAN_TILE_BYTES / group_bytes : 1;
    const int64_t end         = (last + TBQ_SCAN_GROUP - 1) / TBQ_SCAN_GROUP;
    for (int64_t g = first / TBQ_SCAN_GROUP; g < end; g += tile) {
        const int64_t to = end - g < tile ? end : g + tile;
        for (int64_t i = 0; i < n_queries;) {
            const tbq_scan_query * q    = queries + i * rows->blocks;
            float *                best = scores + i * k;
            int64_t *              at   = positions + i * k;
            const int64_t          left = n_queries - i;
#define SCAN(NQ)                                                       \
    if (SCAN_QUERIES >= NQ && left >= NQ) {                            \
        scan_groups(bits, NQ, rows, g, to, last, q, k, best, at);      \
        i += NQ;                                                       \
        continue;                                                      \
    }
#if SCAN_QUERIES >= 8
            SCAN(8)
#endif
#if SCAN_QUERIES >= 4
            SCAN(4)
#endif
#if SCAN_QUERIES >= 2
            SCAN(2)
#endif
            SCAN(1)
#undef SCAN
        }
    }
    for (int64_t i = 0; i < n_queries; i++) {
        sort_best_first(scores + i * k, positions + i * k, k);
    }
}

#define DEFINE_SEARCH(B)                                                                                               \
    static void search_##B(const tbq_scan_rows * rows, int64_t first, int64_t last, const tbq_scan_query * queries,    \
                           int64_t n_queries, int64_t k, float * scores, int64_t * positions) {                        \
        search_rows(B, rows, first, last, queries, n_queries, k, scores, positions);                                   \
    }

DEFINE_SEARCH(2)
DEFINE_SEARCH(3)
DEFINE_SEARCH(4)

const struct tbq_scan_kernels TBQ_SCAN = { .search = { search_2, search_3, search_4 } };
