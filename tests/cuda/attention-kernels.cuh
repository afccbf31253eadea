// SPDX-License-Identifier: MIT
// The kernels of attention.cu by head size; attention-kernels.cu, a program for each, because there are many.
#pragma once

#include "tbq-attention.cuh"

// k, v: bits as in tbq-attention.cuh, a pair that has kernels.  partial: enough for 300 splits.
void launch_64(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);
void launch_128(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);
void launch_256(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream);

// The kernel for whole rows, if it can do this.  early: by programmatic launches, as where the backend allows them.
bool launch_rows(int d, int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream, bool early);
