// SPDX-License-Identifier: MIT
// The implementations behind tbq.h: one table of functions for each instruction set, and the choice of one.
//
// For callers that choose an implementation once, such as ggml's type traits, and for the tests and benchmarks, which
// compare them all.  The tables follow the kernels: unlike tbq.h, this interface changes when they do.
//
// The functions take whole rows (n values, a multiple of TBQ_BLOCK), check nothing, and are otherwise those of the same
// name in tbq.h.  Index a [3] array with bits - 2.
#pragma once

#include "tbq-search.h"
#include "tbq.h"

#ifdef __cplusplus
extern "C" {
#endif

// The search of one implementation.
struct tbq_search_kernels {
    void (*top_k[3])(const tbq_search_rows * rows, int64_t first, int64_t last, const tbq_search_query * queries,
                     int64_t n_queries, int64_t k, float * scores, int64_t * positions);
};

typedef struct {
    const char * name;      // "ref", "avx2", "avx512", "avx512vnni", "neon", "neon-dotprod"
    int (*supported)(void); // whether this machine runs it
    void (*quantize[3])(const float * src, void * dst, int64_t n);
    void (*quantize_kv[3])(const float * src, const float * mean, const float * weight, void * dst, int64_t n);
    void (*dequantize[3])(const void * src, float * dst, int64_t n);
    void (*quantize_act)(const float * src, void * dst, int64_t n);
    float (*dot[3])(const void * row, const void * act, int64_t n);
    // acc += scale . d . k[idx], n floats in the rotated domain: how attention adds a row of values.  tbq_unrotate
    // takes the sum back to the original domain once.
    void (*mad_rotated[3])(const void * src, float scale, float * acc, int64_t n);
    // The same for TBQ_TYPE_TBQ8_0; mean is subtracted, or NULL
    void (*quantize_exact)(const float * src, const float * mean, void * dst, int64_t n);
    void (*dequantize_exact)(const void * src, float * dst, int64_t n);
    float (*dot_exact)(const void * row, const void * act, int64_t n);
    void (*mad_rotated_exact)(const void * src, float scale, float * acc, int64_t n);
    void (*rotate)(const float * src, float * dst, int64_t n);
    void (*unrotate)(const float * src, float * dst, int64_t n);
    const struct tbq_attention_kernels * attention; // of tbq-attention.h; private to ggml_tbq/cpu/attention
    const struct tbq_search_kernels *    search;    // of tbq-search.h
} tbq_kernels;

// Every implementation in this build, slowest first; entry 0 is the scalar reference.  *count receives their number.
// This machine may not support all of them.
TBQ_API const tbq_kernels * const * tbq_list_kernels(int * count);

// The fastest one that this machine supports, which the functions of tbq.h use.
TBQ_API const tbq_kernels * tbq_best_kernels(void);

#ifdef __cplusplus
}
#endif
