// SPDX-License-Identifier: MIT
// The public functions of the search: checks, the layout, and the choice of an implementation.
#include "../tbq-impl.h"
#include "tbq-search.h"

int32_t tbq_search_words(tbq_type type) {
    const tbq_type_info * info = tbq_get_type_info(type);
    return info && info->levels ? tbq_block_words(info->bits) : 0;
}

static tbq_status check(tbq_type type, int64_t blocks, int64_t n) {
    return tbq_search_words(type) == 0 ? TBQ_ERROR_TYPE : blocks < 1 || n < 0 ? TBQ_ERROR_LENGTH : TBQ_OK;
}

tbq_status tbq_search_put(tbq_type type, int64_t blocks, const void * rows, int64_t first, int64_t n, uint16_t * d,
                          uint32_t * codes) {
    const tbq_status status = first < 0 ? TBQ_ERROR_LENGTH : check(type, blocks, n);
    if (status != TBQ_OK || n == 0) {
        return status;
    }
    if (!rows || !d || !codes) {
        return TBQ_ERROR_NULL;
    }
    const uint8_t * block = (const uint8_t *) rows;
    const int64_t   words = tbq_search_words(type);
    for (int64_t v = first; v < first + n; v++) {
        for (int64_t b = 0; b < blocks; b++, block += tbq_row_bytes(type, TBQ_BLOCK)) {
            const int64_t at                                = v / TBQ_SEARCH_GROUP * blocks + b;
            d[at * TBQ_SEARCH_GROUP + v % TBQ_SEARCH_GROUP] = tbq_load_d(block);
            for (int64_t w = 0; w < words; w++) {
                memcpy(codes + (at * words + w) * TBQ_SEARCH_GROUP + v % TBQ_SEARCH_GROUP, tbq_qs(block) + 4 * w, 4);
            }
        }
    }
    return TBQ_OK;
}

tbq_status tbq_search_get(tbq_type type, int64_t blocks, const uint16_t * d, const uint32_t * codes,
                          const int64_t * positions, int64_t n, void * rows) {
    const tbq_status status = check(type, blocks, n);
    if (status != TBQ_OK || n == 0) {
        return status;
    }
    if (!rows || !d || !codes || !positions) {
        return TBQ_ERROR_NULL;
    }
    uint8_t *     block = (uint8_t *) rows;
    const int64_t words = tbq_search_words(type);
    for (int64_t i = 0; i < n; i++) {
        const int64_t v = positions[i];
        for (int64_t b = 0; b < blocks; b++, block += tbq_row_bytes(type, TBQ_BLOCK)) {
            const int64_t at = v / TBQ_SEARCH_GROUP * blocks + b;
            tbq_store_d(block, d[at * TBQ_SEARCH_GROUP + v % TBQ_SEARCH_GROUP]);
            for (int64_t w = 0; w < words; w++) {
                memcpy((uint8_t *) tbq_qs(block) + 4 * w,
                       codes + (at * words + w) * TBQ_SEARCH_GROUP + v % TBQ_SEARCH_GROUP, 4);
            }
        }
    }
    return TBQ_OK;
}

tbq_status tbq_search_prepare(const float * src, tbq_search_query * dst, int64_t n) {
    if (n < 0 || n % TBQ_BLOCK != 0) {
        return TBQ_ERROR_LENGTH;
    }
    if (n > 0 && (!src || !dst)) {
        return TBQ_ERROR_NULL;
    }
    for (int64_t i = 0; i < n; i += TBQ_BLOCK, dst++) {
        block_tbq8_act act;
        tbq_best_kernels()->quantize_act(src + i, &act, TBQ_BLOCK);
        dst->d    = act.d;
        dst->bias = 0;
        for (int l = 0; l < 8; l++) {
            dst->bias += act.bias[l];
        }
        memcpy(dst->qs, act.qs, sizeof(dst->qs));
    }
    return TBQ_OK;
}

tbq_status tbq_search(const tbq_search_rows * rows, int64_t first, int64_t last, const tbq_search_query * queries,
                      int64_t n_queries, int64_t k, float * scores, int64_t * positions) {
    if (!rows) {
        return TBQ_ERROR_NULL;
    }
    const tbq_status status = check(rows->type, rows->blocks, rows->n);
    if (status != TBQ_OK) {
        return status;
    }
    if (first < 0 || first % TBQ_SEARCH_GROUP != 0 || last < first || last > rows->n || n_queries < 0 || k < 1) {
        return TBQ_ERROR_LENGTH;
    }
    if (n_queries > 0 && (!queries || !scores || !positions || (last > first && (!rows->d || !rows->codes)))) {
        return TBQ_ERROR_NULL;
    }
    tbq_best_kernels()->search->top_k[rows->type - TBQ_TYPE_TBQ2_0](rows, first, last, queries, n_queries, k, scores,
                                                                    positions);
    return TBQ_OK;
}
