// SPDX-License-Identifier: MIT
// The kernel for whole rows (tbq-attention-rows.cuh), for attention.cu.
#include "attention-kernels.cuh"
#include "tbq-attention-rows.cuh"

#include "check.cuh"

template <typename... Args>
static void launch(void (*kernel)(Args...), dim3 grid, int threads, int smem, cudaStream_t stream,
                   const rows_options & o, int cluster, Args... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = smem, config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (o.early) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id                 = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x   = (unsigned) cluster;
        attributes[config.numAttrs].val.clusterDim.y   = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

// CTAs at once, in clusters.
template <typename kernel_t> static int count_ctas(kernel_t kernel, int n_sm, int threads, int smem, int cluster) {
    if (cluster == 1) {
        return n_sm;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned) cluster), config.blockDim = dim3(threads), config.dynamicSmemBytes = smem;
    cudaLaunchAttribute attribute{};
    attribute.id               = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned) cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    int n = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&n, kernel, &config));
    return n * cluster;
}

template <int D, int K, int V, int NC, int H, bool ONE, int FORM>
static void launch_shape(tbq_attention_args a, float * partial, cudaStream_t stream, const rows_options & o) {
    using shape             = tbq_rows_shape<D, H, K, V, NC, FORM>;
    auto * const  kernel    = tbq_attention_rows<D, K, V, NC, H, ONE, FORM>;
    constexpr int n_threads = tbq_rows_threads(D, NC, FORM);
    const int     cluster   = FORM & TBQ_ROWS_CLUSTERS ? o.cluster : 1;
    int           n_sm      = 0;
    CHECK(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, 0));
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape::SMEM));
    tbq_attention_rows_partition(a, count_ctas(kernel, n_sm, n_threads, shape::SMEM, cluster), cluster);
    a.partial = partial;
    launch(kernel, dim3(a.n_split * cluster, a.n_groups, a.n_seq), n_threads, shape::SMEM, stream, o, cluster, a);
    if (a.n_split > 1) {
        launch(tbq_attention_rows_combine<D>, dim3(a.n_seq * a.n_q * a.n_head), TBQ_ROWS_COMBINE, 0, stream, o, 1, a);
    }
}

// The forms that can be chosen: for one query row, some pairs.
#define FORMS(X) X(0) X(1) X(3) X(5) X(9) X(13) X(65) X(69) X(193) X(197) X(205) X(17) X(33) X(21) X(37) X(101)

template <int D, int K, int V, int H>
static bool launch_form(const tbq_attention_args & a, float * p, cudaStream_t s, const rows_options & o) {
    constexpr bool SOME = K == V && (K == 4 || (K == 3 && D == 128 && H == 8));
    if constexpr (SOME) {
        switch (o.form) {
#define FORM_CASE(F)                                                                               \
    case F:                                                                                        \
        if constexpr (!(F & (TBQ_ROWS_NO_COMPUTE | TBQ_ROWS_NO_COPIES)) || (D == 128 && H == 8)) { \
            launch_shape<D, K, V, 8, H, true, F>(a, p, s, o);                                      \
            return true;                                                                           \
        }                                                                                          \
        return false;
            FORMS(FORM_CASE)
            default: return false;
        }
    }
    return false;
}

template <int D, int K, int V, int H>
static bool launch_heads(const tbq_attention_args & a, float * p, cudaStream_t s, const rows_options & o) {
    const bool few = tbq_attention_columns(a.n_q * (a.n_head / a.n_head_kv)) == 8;
    if (o.form >= 0) {
        return few && a.n_q == 1 && launch_form<D, K, V, H>(a, p, s, o);
    }
    if constexpr (D < 256) {
        if (!few) {
            launch_shape<D, K, V, 16, H, false, tbq_rows_form(16)>(a, p, s, o);
            return true;
        }
    }
    (a.n_q == 1 ? launch_shape<D, K, V, 8, H, true, tbq_rows_form(8)>
                : launch_shape<D, K, V, 8, H, false, tbq_rows_form(8)>) (a, p, s, o);
    return true;
}

template <int K, int V>
static bool launch_pair(int d, const tbq_attention_args & a, float * p, cudaStream_t s, const rows_options & o) {
    if constexpr (K == V && K > 2) {
        if (d == 64) {
            return launch_heads<64, K, V, 8>(a, p, s, o);
        } else if (d == 256) {
            return launch_heads<256, K, V, 2>(a, p, s, o);
        }
    }
    return d == 128 && (a.n_head_kv == 8 ? launch_heads<128, K, V, 8> : launch_heads<128, K, V, 4>) (a, p, s, o);
}

bool launch_rows(int d, int k, int v, const tbq_attention_args & a, float * partial, cudaStream_t stream,
                 const rows_options & o) {
    int shared = 0; // 227 KiB: sm_90 and sm_100
    CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    if (!tbq_attention_rows_can(a, d, k, v) || shared < 227 * 1024) {
        return false;
    }
    switch (100 * k + v) {
        case 404: return launch_pair<4, 4>(d, a, partial, stream, o);
        case 303: return launch_pair<3, 3>(d, a, partial, stream, o);
        case 202: return launch_pair<2, 2>(d, a, partial, stream, o);
        case 403: return launch_pair<4, 3>(d, a, partial, stream, o);
        case 302: return launch_pair<3, 2>(d, a, partial, stream, o);
        default: return false;
    }
}
