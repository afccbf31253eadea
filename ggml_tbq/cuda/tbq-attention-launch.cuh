// SPDX-License-Identifier: MIT
// Launches the attention kernels.  The files tbq-attention-K-V.cu instantiate this for the types of K and V.
#pragma once

#include "ggml-cuda/common.cuh"
#include "tbq-attention-rows.cuh"
#include "tbq-attention.cuh"

#include <functional>

// What is launched beside attention, right behind its first kernel.  May be empty.
using tbq_attention_beside = std::function<void()>;

template <int D, int BITS_K, int BITS_V, int NC, bool EXACT>
static void tbq_attention_launch_nc(ggml_backend_cuda_context & ctx, tbq_attention_args a,
                                    const tbq_attention_beside & beside) {
    auto * const kernel = tbq_attention<D, BITS_K, BITS_V, NC, EXACT>;
    int          smem   = tbq_attention_smem(D, BITS_K, BITS_V, NC);
    int          n_cta  = 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_cta, kernel, TBQ_ATTENTION_THREADS, smem));
    GGML_ASSERT(n_cta > 0);
    tbq_attention_partition(a, n_cta * ggml_cuda_info().devices[ctx.device].nsm);

    if (EXACT) {
        const auto & info = ggml_cuda_info().devices[ctx.device];
        smem += tbq_attention_stage_exact(a, D, BITS_K, BITS_V, info.nsm,
                                          (int) info.smpbo - smem - tbq_attention_static_smem(D, BITS_K, NC));
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    }

    ggml_cuda_pool_alloc<char> partial(ctx.pool());
    const size_t               bytes = tbq_attention_partial_bytes(a, D);
    a.partial                        = bytes ? (float *) partial.alloc(bytes) : nullptr;

    const int  n_columns = a.n_q * (a.n_head / a.n_head_kv);
    const dim3 grid(a.n_split, (n_columns + NC - 1) / NC * a.n_head_kv, a.n_seq);
    ggml_cuda_kernel_launch(kernel,
                            ggml_cuda_kernel_launch_params(grid, dim3(TBQ_ATTENTION_THREADS), smem, ctx.stream()), a);
    CUDA_CHECK(cudaGetLastError());
    if (beside) {
        beside();
    }
    if (a.n_split > 1) {
        constexpr int groups = 512 / D;
        ggml_cuda_kernel_launch(
            tbq_attention_combine<D, groups, (BITS_V < 8)>,
            ggml_cuda_kernel_launch_params(dim3(a.n_seq * a.n_q * a.n_head), dim3(D, groups), 0, ctx.stream()), a);
        CUDA_CHECK(cudaGetLastError());
    }
}

template <int D, int BITS_K, int BITS_V, int NC, int H, bool ONE>
static void tbq_attention_rows_launch_one(ggml_backend_cuda_context & ctx, tbq_attention_args a,
                                          const tbq_attention_beside & beside) {
    using shape         = tbq_rows_shape<D, H, BITS_K, BITS_V, NC>;
    auto * const kernel = tbq_attention_rows<D, BITS_K, BITS_V, NC, H, ONE>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::SMEM));
    tbq_attention_rows_partition(a, ggml_cuda_info().devices[ctx.device].nsm);

    ggml_cuda_pool_alloc<char> partial(ctx.pool());
    const size_t               bytes = tbq_attention_partial_bytes(a, D);
    a.partial                        = bytes ? (float *) partial.alloc(bytes) : nullptr;

    const dim3 grid(a.n_split, a.n_groups, a.n_seq), block(tbq_rows_threads(D, NC));
    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, block, shape::SMEM, ctx.stream()), a);
    CUDA_CHECK(cudaGetLastError());
    if (beside) {
        beside();
    }
    if (a.n_split > 1) {
        const dim3 rows(a.n_seq * a.n_q * a.n_head);
        ggml_cuda_kernel_launch(tbq_attention_rows_combine<D>,
                                ggml_cuda_kernel_launch_params(rows, dim3(TBQ_ROWS_COMBINE), 0, ctx.stream()), a);
        CUDA_CHECK(cudaGetLastError());
    }
}

template <int D, int BITS_K, int BITS_V, int H>
static void tbq_attention_rows_launch_heads(ggml_backend_cuda_context & ctx, const tbq_attention_args & a,
                                            const tbq_attention_beside & beside) {
    if constexpr (D < 256) { // there one tile of columns (tbq_attention_rows_can)
        if (tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 16) {
            tbq_attention_rows_launch_one<D, BITS_K, BITS_V, 16, H, false>(ctx, a, beside);
            return;
        }
    }
    (a.n_q == 1 ? tbq_attention_rows_launch_one<D, BITS_K, BITS_V, 8, H, true>
                : tbq_attention_rows_launch_one<D, BITS_K, BITS_V, 8, H, false>) (ctx, a, beside);
}

// False: the other kernel is faster, or this one is not for this device or shape.
template <int D, int BITS_K, int BITS_V>
static bool tbq_attention_rows_launch(ggml_backend_cuda_context & ctx, const tbq_attention_args & a,
                                      const tbq_attention_beside & beside) {
    if constexpr (BITS_K < 8 && BITS_V < 8) {
        const auto & info = ggml_cuda_info().devices[ctx.device];
        if (info.cc < GGML_CUDA_CC_HOPPER || info.cc >= GGML_CUDA_CC_BLACKWELL ||
            ggml_cuda_highest_compiled_arch(info.cc) < GGML_CUDA_CC_HOPPER || info.smpbo < 227 * 1024 ||
            !tbq_attention_rows_can(a, D, BITS_K, BITS_V) || !tbq_attention_rows_faster(a, D, BITS_K, BITS_V)) {
            return false;
        }
        if constexpr (D == 64) {
            tbq_attention_rows_launch_heads<D, BITS_K, BITS_V, 8>(ctx, a, beside);
        } else if constexpr (D == 256) {
            tbq_attention_rows_launch_heads<D, BITS_K, BITS_V, 2>(ctx, a, beside);
        } else {
            (a.n_head_kv == 8 ? tbq_attention_rows_launch_heads<D, BITS_K, BITS_V, 8>
                              : tbq_attention_rows_launch_heads<D, BITS_K, BITS_V, 4>) (ctx, a, beside);
        }
        return true;
    }
    return false;
}

template <int D, int BITS_K, int BITS_V>
static void tbq_attention_launch(ggml_backend_cuda_context & ctx, const tbq_attention_args & a,
                                 const tbq_attention_beside & beside) {
    if (tbq_attention_rows_launch<D, BITS_K, BITS_V>(ctx, a, beside)) {
        return;
    }
    const bool few = tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 8;
    if (a.cells) {
        (few ? tbq_attention_launch_nc<D, BITS_K, BITS_V, 8, true>
             : tbq_attention_launch_nc<D, BITS_K, BITS_V, 16, true>) (ctx, a, beside);
    } else {
        (few ? tbq_attention_launch_nc<D, BITS_K, BITS_V, 8, false>
             : tbq_attention_launch_nc<D, BITS_K, BITS_V, 16, false>) (ctx, a, beside);
    }
}

#define TBQ_ATTENTION_DECLARE(K, V)                                                                    \
    void tbq_attention_##K##_##V(ggml_backend_cuda_context & ctx, int d, const tbq_attention_args & a, \
                                 const tbq_attention_beside & beside)

// Keys of K bits, values of V bits: 2, 3, 4 of tbq, 8 of q8_0, 16 of f16.  X(K, V) for every pair that has kernels.
// clang-format off
#define TBQ_ATTENTION_PAIRS(X)                                 \
    X(2, 2) X(2, 3) X(2, 4) X(3, 2) X(3, 3) X(3, 4) X(4, 2) X(4, 3) X(4, 4) \
    X(8, 2) X(8, 3) X(8, 4) X(2, 8) X(3, 8) X(4, 8)            \
    X(16, 2) X(16, 3) X(16, 4) X(2, 16) X(3, 16) X(4, 16)
// clang-format on

#define TBQ_ATTENTION_DECLARE_ONE(K, V) TBQ_ATTENTION_DECLARE(K, V);
TBQ_ATTENTION_PAIRS(TBQ_ATTENTION_DECLARE_ONE)

#define TBQ_ATTENTION_DEFINE(K, V)                                            \
    TBQ_ATTENTION_DECLARE(K, V) {                                             \
        switch (d) {                                                          \
            case 64: tbq_attention_launch<64, K, V>(ctx, a, beside); break;   \
            case 128: tbq_attention_launch<128, K, V>(ctx, a, beside); break; \
            case 256: tbq_attention_launch<256, K, V>(ctx, a, beside); break; \
            default: GGML_ABORT("head size %d", d);                           \
        }                                                                     \
    }
