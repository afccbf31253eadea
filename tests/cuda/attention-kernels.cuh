// SPDX-License-Identifier: MIT
// The kernels of attention.cu by head size; attention-kernels.cu, a program for each, because there are many.
#pragma once

#include "tbq-attention.cuh"

// k, v: bits as in tbq-attention.cuh, a pair that has kernels.  partial: enough for 300 splits.
void launch_64(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);
void launch_128(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);
void launch_256(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);

// The kernel for whole rows, if it can do this.
struct rows_options {
    bool early   = false; // by programmatic launches
    int  form    = -1;    // of the kernel, for one query row; -1: the one of the launcher
    int  cluster = 4;     // CTAs of a cluster, in a form that has them
};

bool launch_rows(int d, int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream,
                 const rows_options & options);
