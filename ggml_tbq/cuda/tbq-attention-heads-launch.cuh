// SPDX-License-Identifier: MIT
// Attention in decode for large or unequal heads: what tbq-cuda.cu calls.  tbq-attention-heads.cu has the kernels.
#pragma once

#include "ggml-cuda/common.cuh"
#include "tbq-attention.cuh"

// More columns than this are a prompt: converting the cache once takes less work than unpacking it for every 16, or with
// latent attention 64.
#define TBQ_HEADS_MAX_COLUMNS        64
#define TBQ_HEADS_MAX_COLUMNS_LATENT 512

// The distance of rows up to which 32-bit arithmetic reaches over a tile.
#define TBQ_HEADS_MAX_STRIDE (1 << 23)

// Whether there is a kernel for dk channels of a key and dv of a value that a CTA's shared memory on this device has room
// for.  Of the arguments only the shape matters, and whether there is a mask.  bits_k, bits_v: 2, 3, 4
bool tbq_heads_fits(int device, int dk, int dv, const tbq_attention_args & a, int bits_k, int bits_v);

// Computes a call for which there is one.  With dk = 576 the values must be the first channels of the keys, in the same
// rows.
void tbq_heads_launch(ggml_backend_cuda_context & ctx, int dk, int dv, const tbq_attention_args & a, int bits_k,
                      int bits_v);
