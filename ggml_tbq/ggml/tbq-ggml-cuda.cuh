// SPDX-License-Identifier: MIT The operations of the CUDA backend on the tbq types; compiled into ggml-cuda.  The
// patched backend calls these functions first.  False, with nothing done, leaves the operation to the backend.
#pragma once

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// Built from the same sources, but nobody has run the kernels there: the backend says that it does not support the
// types, and a cache on such a device is refused when the context is made.  (Included after common.cuh.)
#define TBQ_CUDA_NOT_HERE(name)                                      \
    template <typename... T> static inline bool name(const T &...) { \
        return false;                                                \
    }
TBQ_CUDA_NOT_HERE(tbq_cuda_supports_op)
TBQ_CUDA_NOT_HERE(tbq_cuda_kv_type_supported)
TBQ_CUDA_NOT_HERE(tbq_cuda_compute)
TBQ_CUDA_NOT_HERE(tbq_cuda_fuse)
TBQ_CUDA_NOT_HERE(tbq_cuda_flash_attn_ext_supported)
TBQ_CUDA_NOT_HERE(tbq_cuda_flash_attn_ext_reads_packed)
static inline bool tbq_cuda_flash_attn_ext_converts(const ggml_tensor *) {
    return true;
}
#undef TBQ_CUDA_NOT_HERE
#define TBQ_CUDA_NOT_HERE(name)                    \
    static inline std::nullptr_t name(ggml_type) { \
        return nullptr;                            \
    }
TBQ_CUDA_NOT_HERE(tbq_cuda_to_fp16)
TBQ_CUDA_NOT_HERE(tbq_cuda_to_bf16)
TBQ_CUDA_NOT_HERE(tbq_cuda_to_fp32)
TBQ_CUDA_NOT_HERE(tbq_cuda_to_fp16_nc)
TBQ_CUDA_NOT_HERE(tbq_cuda_to_bf16_nc)
TBQ_CUDA_NOT_HERE(tbq_cuda_to_fp32_nc)
#undef TBQ_CUDA_NOT_HERE

#else

#include "ggml-cuda/common.cuh"
#include "ggml-cuda/convert.cuh"

// Whether this is an operation on a tbq type that the kernels support.  (Attention: below.)
bool tbq_cuda_supports_op(const ggml_tensor * op);

// Whether a cache may have this type.
bool tbq_cuda_kv_type_supported(ggml_type type);

// Computes a node: SET_ROWS (f32 or f16, int32 or int64 row numbers; the CPU's bytes, exact rows too), CPY between f32
// and blocks of one shape, GET_ROWS, CONCAT of exact rows (tbq_ggml_concat_exact), MUL_MAT and MUL_MAT_ID with up to
// eight columns, and attention, below.
bool tbq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// In decode a launch takes as long as the work in it.  So the ROPE of a token's keys, their SET_ROWS and the SET_ROWS
// of its values become one launch, if node i is the first of them and they follow each other (ROPE and keys, keys and
// values, or all three).  Attention right behind them is computed here, too, if it reads their exact rows: then these come
// first, and packed rows are written beside it.  The SUB of the keys' mean and the SET_ROWS of llama.cpp's quantized types
// become one launch, too.  Returns how many nodes after i are done, 0 if node i is something else.
int tbq_cuda_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Values in the original domain, the CPU's to the last bit, rounded once.
to_fp16_cuda_t    tbq_cuda_to_fp16(ggml_type type);
to_bf16_cuda_t    tbq_cuda_to_bf16(ggml_type type);
to_fp32_cuda_t    tbq_cuda_to_fp32(ggml_type type);
to_fp16_nc_cuda_t tbq_cuda_to_fp16_nc(ggml_type type);
to_bf16_nc_cuda_t tbq_cuda_to_bf16_nc(ggml_type type);
to_fp32_nc_cuda_t tbq_cuda_to_fp32_nc(ggml_type type);

// Attention from packed blocks, head sizes 64, 128 and 256: up to 64 columns (query heads of one KV head times tokens; any
// number if nothing else has a kernel), K and V both tbq, or one of them q8_0 or f16, sm_80 and later; on compute
// capability 9.0 any number, K and V both tbq, if the build is for it.  Everything else converts to f16 and takes the
// backend's own kernels.  Both ways read exact rows (tbq_ggml_flash_attn_ext_exact) and take centered keys as whole
// (tbq_ggml_flash_attn_ext_center); where neither can, the node is not supported.
bool tbq_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst);
bool tbq_cuda_flash_attn_ext_converts(const ggml_tensor * dst); // whether those kernels work for it

// Whether a node that is supported is computed from packed blocks, so that it needs no memory for a converted cache: what
// the first of these two takes, and few columns of head sizes 192/128, 512 and 576/512.  The latter are computed so only
// where the backend's own kernels could take them converted, so they make nothing supported that was not.
bool tbq_cuda_flash_attn_ext_reads_packed(int device, const ggml_tensor * dst);

#endif
