// SPDX-License-Identifier: MIT
// The operations of the CUDA backend on the tbq types; compiled into ggml-cuda.  The patched backend asks here first;
// false, with nothing done, means that it is not ours.
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
static inline bool tbq_cuda_flash_attn_ext_converts(const ggml_tensor *) {
    return true;
}
#undef TBQ_CUDA_NOT_HERE
#define TBQ_CUDA_NOT_HERE(name)                             \
    static inline std::nullptr_t name(ggml_type) {          \
        return nullptr;                                     \
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

// Is this an operation on a tbq type that the backend does?  (Attention: below.)
bool tbq_cuda_supports_op(const ggml_tensor * op);

// May a cache have this type?
bool tbq_cuda_kv_type_supported(ggml_type type);

// Computes a node: SET_ROWS (f32 or f16, int32 or int64 row numbers; the CPU's bytes), CPY between f32 and blocks of one
// shape, GET_ROWS, MUL_MAT and MUL_MAT_ID with up to eight columns, and attention, below.
bool tbq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// In decode a launch costs as much as what it does here.  The ROPE of a token's keys, their SET_ROWS and that of its values
// become one launch, as far as node i begins with them and they follow each other (ROPE and keys, keys and values, all);
// so do the SUB of the keys' mean and the SET_ROWS of llama.cpp's own quantized types.
// The number of nodes after i that are done with it, 0 if it is something else.
int tbq_cuda_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Values in the original domain, the CPU's to the last bit, rounded once.
to_fp16_cuda_t    tbq_cuda_to_fp16(ggml_type type);
to_bf16_cuda_t    tbq_cuda_to_bf16(ggml_type type);
to_fp32_cuda_t    tbq_cuda_to_fp32(ggml_type type);
to_fp16_nc_cuda_t tbq_cuda_to_fp16_nc(ggml_type type);
to_bf16_nc_cuda_t tbq_cuda_to_bf16_nc(ggml_type type);
to_fp32_nc_cuda_t tbq_cuda_to_fp32_nc(ggml_type type);

// Attention from packed blocks: up to 64 columns (query heads of one KV head times tokens; any number where nothing else
// has a kernel), head sizes 64, 128, 256, tbq on both sides or beside q8_0 or f16, sm_80 and later.  Everything else converts to f16 and takes the backend's own kernels.
bool tbq_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst);
bool tbq_cuda_flash_attn_ext_converts(const ggml_tensor * dst); // can it, as far as we know

#endif
