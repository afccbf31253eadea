// SPDX-License-Identifier: MIT
// nvcc -DHEAD_SIZE=64 (or 128, 256)
#include "attention-kernels.cuh"

#include "check.cuh"

static int device_attribute(cudaDeviceAttr attribute) {
    int n = 0;
    CHECK(cudaDeviceGetAttribute(&n, attribute, 0));
    return n;
}

template <int K, int V, int NC, bool EXACT>
static void launch_nc(tbq_attention_args a, float * partial, cudaStream_t stream) {
    constexpr int D      = HEAD_SIZE;
    auto * const  kernel = tbq_attention<D, K, V, NC, EXACT>;
    int           smem   = tbq_attention_smem(D, K, V, NC);
    int           n_cta  = 0;
    const int     n_sm   = device_attribute(cudaDevAttrMultiProcessorCount);
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_cta, kernel, TBQ_ATTENTION_THREADS, smem));
    tbq_attention_partition(a, n_cta * n_sm);
    if (EXACT) {
        smem += tbq_attention_stage_exact(a, D, K, V, n_sm,
                                          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - smem -
                                              tbq_attention_static_smem(D, K, NC));
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    }
    a.partial            = partial;
    const int  n_columns = a.n_q * (a.n_head / a.n_head_kv);
    const dim3 grid(a.n_split, (n_columns + NC - 1) / NC * a.n_head_kv, a.n_seq);
    kernel<<<grid, TBQ_ATTENTION_THREADS, smem, stream>>>(a);
    CHECK(cudaGetLastError());
    if (a.n_split > 1) {
        tbq_attention_combine<D, 512 / D, (V < 8)><<<a.n_seq * a.n_q * a.n_head, dim3(D, 512 / D), 0, stream>>>(a);
        CHECK(cudaGetLastError());
    }
}

// PLAIN: some pairs are checked only with exact rows.
template <int K, int V, bool PLAIN>
static void launch_pair(const tbq_attention_args & a, float * partial, cudaStream_t stream) {
    const bool few = tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 8;
    if (a.cells) {
        (few ? launch_nc<K, V, 8, true> : launch_nc<K, V, 16, true>) (a, partial, stream);
        return;
    }
    if constexpr (PLAIN) {
        (few ? launch_nc<K, V, 8, false> : launch_nc<K, V, 16, false>) (a, partial, stream);
        return;
    }
    std::exit(3);
}

#define NAME_OF(d) launch_##d
#define NAME(d)    NAME_OF(d)

void NAME(HEAD_SIZE)(int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream) {
#define CASE(K, V, PLAIN) \
    case 100 * K + V: return launch_pair<K, V, PLAIN>(a, partial, stream);
    switch (100 * k + v) {
        CASE(4, 4, true)
        CASE(4, 3, true)
        CASE(3, 3, true)
        CASE(3, 2, true)
        CASE(2, 2, true)
        CASE(2, 4, true)
        CASE(8, 4, true)
        CASE(3, 8, true)
        CASE(16, 3, true)
        CASE(4, 16, true)
        CASE(4, 2, false)
        CASE(2, 3, false)
        CASE(3, 4, false)
        CASE(8, 2, false)
        CASE(8, 3, false)
        CASE(2, 8, false)
        CASE(4, 8, false)
        CASE(16, 2, false)
        CASE(16, 4, false)
        CASE(2, 16, false)
        CASE(3, 16, false)
        default: std::exit(3);
    }
}
