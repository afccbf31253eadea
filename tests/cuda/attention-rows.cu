// SPDX-License-Identifier: MIT
// The kernel for whole rows (tbq-attention-rows.cuh), for attention.cu.
#include "attention-kernels.cuh"
#include "tbq-attention-rows.cuh"

#include "check.cuh"

template <typename... Args> static void launch(void (*kernel)(Args...), dim3 grid, int threads, int smem,
                                               cudaStream_t stream, bool early, Args... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem, config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

template <int D, int K, int V, int NC, int H, bool ONE>
static void launch_shape(tbq_attention_args a, float * partial, cudaStream_t stream, bool early) {
    using shape         = tbq_rows_shape<D, H, K, V, NC>;
    auto * const kernel = tbq_attention_rows<D, K, V, NC, H, ONE>;
    int          n_sm   = 0;
    CHECK(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, 0));
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::SMEM));
    tbq_attention_rows_partition(a, n_sm);
    a.partial = partial;
    launch(kernel, dim3(a.n_split, a.n_groups, a.n_seq), tbq_rows_threads(D, NC), shape::SMEM, stream, early, a);
    if (a.n_split > 1) {
        launch(tbq_attention_rows_combine<D>, dim3(a.n_seq * a.n_q * a.n_head), TBQ_ROWS_COMBINE, 0, stream, early, a);
    }
}

template <int D, int K, int V, int H>
static bool launch_heads(const tbq_attention_args & a, float * p, cudaStream_t s, bool early) {
    if constexpr (D < 256) {
        if (tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 16) {
            launch_shape<D, K, V, 16, H, false>(a, p, s, early);
            return true;
        }
    }
    (a.n_q == 1 ? launch_shape<D, K, V, 8, H, true> : launch_shape<D, K, V, 8, H, false>) (a, p, s, early);
    return true;
}

template <int K, int V>
static bool launch_pair(int d, const tbq_attention_args & a, float * p, cudaStream_t s, bool early) {
    if constexpr (K == V && K > 2) {
        if (d == 64) {
            return launch_heads<64, K, V, 8>(a, p, s, early);
        } else if (d == 256) {
            return launch_heads<256, K, V, 2>(a, p, s, early);
        }
    }
    return d == 128 && (a.n_head_kv == 8 ? launch_heads<128, K, V, 8> : launch_heads<128, K, V, 4>) (a, p, s, early);
}

bool launch_rows(int d, int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream, bool early) {
    int shared = 0; // 227 KiB: sm_90 and sm_100
    CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (!tbq_attention_rows_can(a, d, k, v) || shared < 227 * 1024) {
        return false;
    }
    switch (100 * k + v) {
        case 404: return launch_pair<4, 4>(d, a, partial, stream, early);
        case 303: return launch_pair<3, 3>(d, a, partial, stream, early);
        case 202: return launch_pair<2, 2>(d, a, partial, stream, early);
        case 403: return launch_pair<4, 3>(d, a, partial, stream, early);
        case 302: return launch_pair<3, 2>(d, a, partial, stream, early);
        default: return false;
    }
}
