// SPDX-License-Identifier: MIT
// Launches the kernels of tbq-attention-heads.cuh.
#include "tbq-attention-heads.cuh"

#include "ggml-cuda/common.cuh"
#include "tbq-attention-heads-launch.cuh"

template <int DK, int DV, int NC> static void launch(ggml_backend_cuda_context & ctx, tbq_heads_args a) {
    using shape         = tbq_heads_shape<DK, DV, NC>;
    auto * const kernel = tbq_attention_heads<DK, DV, NC>;
    const int    smem   = shape::smem(a.bits_k, a.bits_v, tbq_heads_mask_rows(a, NC));
    int          n_cta  = 0;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_cta, kernel, TBQ_HEADS_THREADS, smem));
    GGML_ASSERT(n_cta > 0);
    tbq_heads_partition<DK, DV, NC>(a, n_cta * ggml_cuda_info().devices[ctx.device].nsm);

    ggml_cuda_pool_alloc<char> partial(ctx.pool(), tbq_heads_partial_bytes(a, DV)), prepared(ctx.pool());
    a.partial = (float *) partial.ptr;

    const dim3 block(TBQ_HEADS_THREADS);
    const int  n_cells = a.n_groups * a.n_head_kv;
    if constexpr (shape::PREPARED) {
        a.prepared = prepared.alloc(tbq_heads_prepared_bytes<DK, DV, NC>(a));
        const dim3 grid((NC * shape::NB + TBQ_HEADS_WARPS - 1) / TBQ_HEADS_WARPS, n_cells, a.n_seq);
        ggml_cuda_kernel_launch(tbq_heads_prepare<DK, DV, NC>,
                                ggml_cuda_kernel_launch_params(grid, block, 0, ctx.stream()), a);
        CUDA_CHECK(cudaGetLastError());
    }
    ggml_cuda_kernel_launch(
        kernel, ggml_cuda_kernel_launch_params(dim3(a.n_split, n_cells, a.n_seq), block, smem, ctx.stream()), a);
    CUDA_CHECK(cudaGetLastError());
    const dim3 rows(a.n_seq * a.n_q * a.n_head, DV / 64);
    ggml_cuda_kernel_launch(tbq_heads_combine<DK, DV>, ggml_cuda_kernel_launch_params(rows, block, 0, ctx.stream()), a);
    CUDA_CHECK(cudaGetLastError());
}

// Columns of a CTA, 0 if there is no kernel.
static int columns(int device, int dk, int dv, const tbq_heads_args & a) {
    return tbq_heads_columns(a, dk, dv, (int) ggml_cuda_info().devices[device].smpbo);
}

bool tbq_heads_fits(int device, int dk, int dv, const tbq_attention_args & a, int bits_k, int bits_v) {
    return columns(device, dk, dv, tbq_heads_args_of(a, bits_k, bits_v)) != 0;
}

void tbq_heads_launch(ggml_backend_cuda_context & ctx, int dk, int dv, const tbq_attention_args & base, int bits_k,
                      int bits_v) {
    const tbq_heads_args a  = tbq_heads_args_of(base, bits_k, bits_v);
    const int            nc = columns(ctx.device, dk, dv, a);
    const bool           is = tbq_heads_dispatch(dk, dv, nc, [&](auto k, auto v, auto n) { launch<k, v, n>(ctx, a); });
    GGML_ASSERT(is);
}
