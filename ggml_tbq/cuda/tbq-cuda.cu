// SPDX-License-Identifier: MIT
#include "tbq-ggml-cuda.cuh"

#include "ggml-cuda/fattn.cuh"
#include "ggml-impl.h"

#include "tbq-attention-heads-launch.cuh"
#include "tbq-attention-launch.cuh"
#include "tbq-center.cuh"
#include "tbq-dequantize.cuh"
#include "tbq-ggml.h"
#include "tbq-matvec.cuh"
#include "tbq-prompt-launch.cuh"
#include "tbq-quantize.cuh"

// Bits of an index, of a q8_0 or an f16 value; 0 for other types.
static int kv_bits(ggml_type type) {
    return ggml_is_tbq(type)        ? 2 + type - GGML_TYPE_TBQ2_0
           : type == GGML_TYPE_Q8_0 ? 8
           : type == GGML_TYPE_F16  ? 16
                                    : 0;
}

// f(std::integral_constant<int, bits>)
template <typename F> static void dispatch_bits(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_TBQ2_0: f(std::integral_constant<int, 2>()); break;
        case GGML_TYPE_TBQ3_0: f(std::integral_constant<int, 3>()); break;
        case GGML_TYPE_TBQ4_0: f(std::integral_constant<int, 4>()); break;
        default: GGML_ABORT("%s is not a tbq type", ggml_type_name(type));
    }
}

static dim3 grid_for(int64_t n_threads, int block) {
    const int64_t n = (n_threads + block - 1) / block;
    GGML_ASSERT(n <= INT_MAX);
    return dim3((unsigned) n);
}

// The shape of one tensor in blocks, and the strides of another (or of the same) in units of so many bytes.
static tbq_rows rows_of(const ggml_tensor * shape, const ggml_tensor * strides, size_t unit) {
    const auto stride = [&](int i) { return (long long) (strides->nb[i] / unit); };
    return { { shape->ne[0] / TBQ_BLOCK, shape->ne[1], shape->ne[2], shape->ne[3] },
             { stride(1), stride(2), stride(3) } };
}

// --- values to blocks --------------------------------------------------------------------------------------------

// Few enough blocks for the multiprocessors to take at once: those of the tokens of a decode step.  (__reduce_max_sync
// needs sm_80.)
static bool is_decode_size(const tbq_encode_args & a) {
    const int cc = ggml_cuda_info().devices[ggml_cuda_get_device()].cc;
    return a.from.n_blocks() <= 512 && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_AMPERE;
}

static void encode(ggml_type type, bool half_source, const tbq_encode_args & a, cudaStream_t stream) {
    const int64_t n = a.from.n_blocks();
    if (n == 0) {
        return;
    }
    const bool                           decode_size = is_decode_size(a);
    const ggml_cuda_kernel_launch_params launch(decode_size ? dim3((unsigned) n) : grid_for(16 * n, TBQ_ENCODE_THREADS),
                                                dim3(decode_size ? TBQ_DECODE_SIZE_THREADS : TBQ_ENCODE_THREADS), 0,
                                                stream);
    dispatch_bits(type, [&](auto bits) {
        if (half_source) {
            ggml_cuda_kernel_launch(decode_size ? tbq_quantize_decode_size<bits, half> : tbq_quantize_rows<bits, half>,
                                    launch, a);
        } else {
            ggml_cuda_kernel_launch(
                decode_size ? tbq_quantize_decode_size<bits, float> : tbq_quantize_rows<bits, float>, launch, a);
        }
    });
    CUDA_CHECK(cudaGetLastError());
}

// src: f32 or f16, dst: tbq, of the same sizes but for the rows
static tbq_encode_args encode_args(const ggml_tensor * src, const ggml_tensor * dst) {
    tbq_encode_args a = {};
    a.src             = src->data;
    a.dst             = (char *) dst->data;
    a.from            = rows_of(src, src, ggml_type_size(src->type));
    a.to              = rows_of(src, dst, 1);
    return a;
}

static tbq_encode_args set_rows_args(const ggml_tensor * dst) {
    const ggml_tensor * ids = dst->src[1];
    const size_t        ti  = ggml_type_size(ids->type);
    tbq_encode_args     a   = encode_args(dst->src[0], dst);
    a.ids                   = ids->data;
    a.ids_64                = ids->type == GGML_TYPE_I64;
    a.ids_ne1               = ids->ne[1];
    a.ids_ne2               = ids->ne[2];
    a.ids_s0                = ids->nb[0] / ti;
    a.ids_s1                = ids->nb[1] / ti;
    a.ids_s2                = ids->nb[2] / ti;
    // centered keys: ggml_tbq/llama/llama-center.cpp
    a.mean   = dst->src[3] ? (const float *) dst->src[3]->data : nullptr;
    a.weight = dst->src[4] ? (const float *) dst->src[4]->data : nullptr;
    if (const ggml_tensor * exact = dst->src[5]) {
        a.exact     = (char *) exact->data;
        a.exact_nb1 = exact->nb[1];
        a.slots     = (const int *) dst->src[6]->data + dst->op_params[0];
    }
    return a;
}

static bool set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!ggml_is_tbq(dst->type)) {
        return false;
    }
    encode(dst->type, dst->src[0]->type == GGML_TYPE_F16, set_rows_args(dst), ctx.stream());
    return true;
}

// rows of values after n_before rows of blocks, to exact rows
static void encode_exact(const ggml_tensor * before, const ggml_tensor * src, const ggml_tensor * mean,
                         ggml_tensor * dst, cudaStream_t stream) {
    tbq_exact_args a = {};
    a.src            = (const float *) src->data;
    a.dst            = (char *) dst->data;
    a.from           = rows_of(dst, src, sizeof(float));
    a.to             = rows_of(dst, dst, 1);
    a.mean           = mean ? (const float *) mean->data : nullptr;
    if (before) {
        a.before     = (const char *) before->data;
        a.n_before   = before->ne[1];
        a.before_nb1 = before->nb[1];
        a.before_nb2 = before->nb[2];
        a.before_nb3 = before->nb[3];
    }
    const int64_t n = a.from.n_blocks();
    if (n == 0) {
        return;
    }
    const ggml_cuda_kernel_launch_params launch(grid_for(16 * n, TBQ_ENCODE_THREADS), dim3(TBQ_ENCODE_THREADS), 0,
                                                stream);
    ggml_cuda_kernel_launch(tbq_quantize_exact_rows, launch, a);
    CUDA_CHECK(cudaGetLastError());
}

static bool concat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (dst->type != GGML_TYPE_TBQ8_0) {
        return false;
    }
    encode_exact(dst->src[0], dst->src[1], dst->src[2], dst, ctx.stream());
    return true;
}

// The arguments of tbq_rope, if it can compute this rotary embedding.
static bool rope_args(const ggml_tensor * rope, tbq_rope_args & r) {
    const ggml_tensor * x      = rope->src[0];
    const int32_t *     params = (const int32_t *) rope->op_params;
    const int           n_dims = params[1], mode = params[2], n_ctx_orig = params[4], n_offs = params[15];
    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || n_offs != 0 || n_dims % 2 != 0 ||
        x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[3] != 1 || x->ne[0] % TBQ_BLOCK != 0) {
        return false;
    }
    float freq_base, beta_fast, beta_slow, corr[2];
    memcpy(&freq_base, params + 5, sizeof(float));
    memcpy(&r.freq_scale, params + 6, sizeof(float));
    memcpy(&r.ext_factor, params + 7, sizeof(float));
    memcpy(&r.attn_factor, params + 8, sizeof(float));
    memcpy(&beta_fast, params + 9, sizeof(float));
    memcpy(&beta_slow, params + 10, sizeof(float));
    ggml_rope_yarn_corr_dims(n_dims, n_ctx_orig, freq_base, beta_fast, beta_slow, corr);
    r.head_size   = x->ne[0];
    r.n_dims      = n_dims;
    r.neox        = mode == GGML_ROPE_TYPE_NEOX;
    r.pos         = (const int *) rope->src[1]->data;
    r.factors     = rope->src[2] ? (const float *) rope->src[2]->data : nullptr;
    r.theta_scale = powf(freq_base, -2.0f / n_dims);
    r.corr_low    = corr[0];
    r.corr_high   = corr[1];
    r.s_head      = x->nb[1] / sizeof(float);
    return true;
}

// The node after i that computes something.
static int next_node(const ggml_cgraph * graph, int i) {
    do {
        i++;
    } while (i < graph->n_nodes && ggml_op_is_empty(graph->nodes[i]->op));
    return i;
}

using center_kernel = void (*)(tbq_center_args);

static center_kernel center_kernel_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return tbq_center_rows<block_q4_0, QK4_0, quantize_f32_q4_0_block>;
        case GGML_TYPE_Q4_1: return tbq_center_rows<block_q4_1, QK4_1, quantize_f32_q4_1_block>;
        case GGML_TYPE_Q5_0: return tbq_center_rows<block_q5_0, QK5_0, quantize_f32_q5_0_block>;
        case GGML_TYPE_Q5_1: return tbq_center_rows<block_q5_1, QK5_1, quantize_f32_q5_1_block>;
        case GGML_TYPE_Q8_0: return tbq_center_rows<block_q8_0, QK8_0, quantize_f32_q8_0_block>;
        case GGML_TYPE_IQ4_NL: return tbq_center_rows<block_iq4_nl, QK4_NL, quantize_f32_iq4_nl_block>;
        default: return nullptr;
    }
}

// SUB of the mean and SET_ROWS into a type of llama.cpp's own, as llama_kv_cache::center_set_rows combines them.
static int fuse_center(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * sub = graph->nodes[i];
    const int           j   = next_node(graph, i);
    if (sub->op != GGML_OP_SUB || j >= graph->n_nodes || !ggml_node_has_n_uses(graph, i, 1)) {
        return 0;
    }
    ggml_tensor *       dst    = graph->nodes[j];
    const ggml_tensor * x      = sub->src[0];
    const ggml_tensor * mean   = sub->src[1];
    const center_kernel kernel = center_kernel_of(dst->type);
    auto aligned = [](const void * p, size_t stride) { return ((uintptr_t) p | stride) % sizeof(float4) == 0; };
    if (dst->op != GGML_OP_SET_ROWS || dst->src[0] != sub || !(dst->flags & GGML_TENSOR_FLAG_COMPUTE) || !kernel ||
        x->type != GGML_TYPE_F32 || mean->type != GGML_TYPE_F32 || sub->type != GGML_TYPE_F32 ||
        x->nb[0] != sizeof(float) || mean->nb[0] != sizeof(float) || mean->ne[0] != x->ne[0] || ggml_nrows(mean) != 1 ||
        x->ne[2] * x->ne[3] != 1 || ggml_is_empty(x) || !aligned(x->data, x->nb[1]) || !aligned(mean->data, 0)) {
        return 0;
    }
    const ggml_tensor * ids = dst->src[1];
    tbq_center_args     a   = {};
    a.src                   = (const float *) x->data;
    a.mean                  = (const float *) mean->data;
    a.dst                   = (char *) dst->data;
    a.ids                   = ids->data;
    a.ids_64                = ids->type == GGML_TYPE_I64;
    a.ids_s0                = ids->nb[0] / ggml_type_size(ids->type);
    a.ne0                   = x->ne[0] / ggml_blck_size(dst->type);
    a.n                     = a.ne0 * x->ne[1];
    a.s1                    = x->nb[1] / sizeof(float);
    a.nb1                   = dst->nb[1];
    const ggml_cuda_kernel_launch_params launch(grid_for(a.n, TBQ_CENTER_THREADS), dim3(TBQ_CENTER_THREADS), 0,
                                                ctx.stream());
    ggml_cuda_kernel_launch(kernel, launch, a);
    CUDA_CHECK(cudaGetLastError());
    return j - i;
}

// --- blocks to values --------------------------------------------------------------------------------------------

template <typename dst_t> static void decode(ggml_type type, const tbq_decode_args & a, cudaStream_t stream) {
    const int64_t n = a.from.n_blocks();
    if (n == 0) {
        return;
    }
    const ggml_cuda_kernel_launch_params launch(grid_for(4 * n, 256), dim3(256), 0, stream);
    dispatch_bits(type, [&](auto bits) { ggml_cuda_kernel_launch(tbq_dequantize_rows<bits, dst_t>, launch, a); });
    CUDA_CHECK(cudaGetLastError());
}

// exact rows; cells: see the kernel
template <typename dst_t> static void decode_exact(const tbq_decode_args & a, const int * cells, int64_t cells_s1,
                                                   cudaStream_t stream) {
    const int64_t n = a.from.n_blocks();
    if (n == 0) {
        return;
    }
    const ggml_cuda_kernel_launch_params launch(grid_for(16 * n, 256), dim3(256), 0, stream);
    ggml_cuda_kernel_launch(tbq_dequantize_exact_rows<dst_t>, launch, a, cells, (long long) cells_s1);
    CUDA_CHECK(cudaGetLastError());
}

// A tbq type or tbq8_0.
template <typename dst_t> static void decode_any(ggml_type type, const tbq_decode_args & a, cudaStream_t stream) {
    if (type == GGML_TYPE_TBQ8_0) {
        decode_exact<dst_t>(a, nullptr, 0, stream);
    } else {
        decode<dst_t>(type, a, stream);
    }
}

// s01, s02, s03 count blocks
template <int BITS, typename dst_t>
static void to_values_nc(const void * x, dst_t * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03, int64_t s01,
                         int64_t s02, int64_t s03, cudaStream_t stream) {
    constexpr int64_t bytes = BITS == 8 ? sizeof(block_tbq8_0) : tbq_block_bytes(BITS);
    tbq_decode_args   a     = {};
    a.src                   = (const char *) x;
    a.dst                   = y;
    a.from                  = { { ne00 / TBQ_BLOCK, ne01, ne02, ne03 }, { s01 * bytes, s02 * bytes, s03 * bytes } };
    a.to                    = { { ne00 / TBQ_BLOCK, ne01, ne02, ne03 }, { ne00, ne00 * ne01, ne00 * ne01 * ne02 } };
    decode_any<dst_t>(BITS == 8 ? GGML_TYPE_TBQ8_0 : (ggml_type) (GGML_TYPE_TBQ2_0 + BITS - 2), a, stream);
}

template <int BITS, typename dst_t> static void to_values(const void * x, dst_t * y, int64_t k, cudaStream_t stream) {
    to_values_nc<BITS>(x, y, k, 1, 1, 1, 0, 0, 0, stream);
}

#define TBQ_PICK(function, type, dst_t)                \
    ((type) == GGML_TYPE_TBQ2_0   ? function<2, dst_t> \
     : (type) == GGML_TYPE_TBQ3_0 ? function<3, dst_t> \
     : (type) == GGML_TYPE_TBQ4_0 ? function<4, dst_t> \
     : (type) == GGML_TYPE_TBQ8_0 ? function<8, dst_t> \
                                  : nullptr)

to_fp16_cuda_t tbq_cuda_to_fp16(ggml_type type) {
    return TBQ_PICK(to_values, type, half);
}

to_bf16_cuda_t tbq_cuda_to_bf16(ggml_type type) {
    return TBQ_PICK(to_values, type, nv_bfloat16);
}

to_fp32_cuda_t tbq_cuda_to_fp32(ggml_type type) {
    return TBQ_PICK(to_values, type, float);
}

to_fp16_nc_cuda_t tbq_cuda_to_fp16_nc(ggml_type type) {
    return TBQ_PICK(to_values_nc, type, half);
}

to_bf16_nc_cuda_t tbq_cuda_to_bf16_nc(ggml_type type) {
    return TBQ_PICK(to_values_nc, type, nv_bfloat16);
}

to_fp32_nc_cuda_t tbq_cuda_to_fp32_nc(ggml_type type) {
    return TBQ_PICK(to_values_nc, type, float);
}

// src: tbq, dst: values, of the same sizes but for the rows
static tbq_decode_args decode_args(const ggml_tensor * src, const ggml_tensor * dst) {
    tbq_decode_args a = {};
    a.src             = (const char *) src->data;
    a.dst             = dst->data;
    a.from            = rows_of(dst, src, 1);
    a.to              = rows_of(dst, dst, ggml_type_size(dst->type));
    return a;
}

// The types that a cache holds.
static bool is_cached(ggml_type type) {
    return ggml_is_tbq(type) || type == GGML_TYPE_TBQ8_0;
}

static bool cpy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    if (is_cached(src->type) && dst->type == GGML_TYPE_F32) {
        decode_any<float>(src->type, decode_args(src, dst), ctx.stream());
        return true;
    }
    if (dst->type == GGML_TYPE_TBQ8_0 && src->type == GGML_TYPE_F32) {
        encode_exact(nullptr, src, nullptr, dst, ctx.stream());
        return true;
    }
    if (ggml_is_tbq(dst->type) && src->type == GGML_TYPE_F32) {
        encode(dst->type, false, encode_args(src, dst), ctx.stream());
        return true;
    }
    return false;
}

static bool get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * ids = dst->src[1];
    if (!is_cached(src->type)) {
        return false;
    }
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->ne[3] == 1);
    tbq_decode_args a = decode_args(src, dst);
    a.ids             = (const int *) ids->data;
    a.ids_s0          = ids->nb[0] / sizeof(int);
    a.ids_s1          = ids->nb[1] / sizeof(int);
    a.ids_s2          = ids->nb[2] / sizeof(int);
    switch (dst->type) {
        case GGML_TYPE_F32: decode_any<float>(src->type, a, ctx.stream()); break;
        case GGML_TYPE_F16: decode_any<half>(src->type, a, ctx.stream()); break;
        case GGML_TYPE_BF16: decode_any<nv_bfloat16>(src->type, a, ctx.stream()); break;
        default: GGML_ABORT("GET_ROWS from %s to %s", ggml_type_name(src->type), ggml_type_name(dst->type));
    }
    return true;
}

// --- weights -------------------------------------------------------------------------------------------------------

static bool mul_mat_supported(const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
                              const ggml_tensor * dst) {
    return ggml_is_tbq(src0->type) && src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 &&
           src1->nb[0] == sizeof(float) && src0->ne[0] > 0 &&
           (ids ? dst->ne[2] <= 8 && ids->ne[0] <= 65535
                : src1->ne[1] <= 8 && src1->ne[2] <= 65535 && src1->ne[3] <= 65535);
}

static bool mul_mat(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1,
                    const ggml_tensor * ids, ggml_tensor * dst) {
    if (!mul_mat_supported(src0, src1, ids, dst)) {
        return false;
    }
    cudaStream_t  stream   = ctx.stream();
    const int64_t n_blocks = src0->ne[0] / TBQ_BLOCK;
    const int64_t n_all    = n_blocks * ggml_nrows(src1);

    ggml_cuda_pool_alloc<tbq_activations> x(ctx.pool(), n_all);
    tbq_activations_args                  r = {};
    r.src                                   = (const float *) src1->data;
    r.dst                                   = x.ptr;
    r.rows                                  = rows_of(src1, src1, sizeof(float));
    ggml_cuda_kernel_launch(tbq_rotate_activations,
                            ggml_cuda_kernel_launch_params(grid_for(32 * n_all, 128), dim3(128), 0, stream), r);
    CUDA_CHECK(cudaGetLastError());

    tbq_matvec_args a = {};
    a.w               = (const char *) src0->data;
    a.x               = x.ptr;
    a.dst             = (float *) dst->data;
    a.ids             = ids ? (const int *) ids->data : nullptr;
    a.n_blocks        = n_blocks;
    a.n_rows          = src0->ne[1];
    a.n_cols          = ids ? 1 : src1->ne[1];
    a.nb1             = src0->nb[1];
    a.nb2             = src0->nb[2];
    a.nb3             = src0->nb[3];
    a.ne02            = src0->ne[2];
    a.ne03            = src0->ne[3];
    a.ne12            = src1->ne[2];
    a.ne13            = src1->ne[3];
    a.x_slots         = src1->ne[1];
    a.x_s1            = n_blocks;
    a.x_s2            = n_blocks * src1->ne[1];
    a.x_s3            = n_blocks * src1->ne[1] * src1->ne[2];
    a.dst_s1          = dst->nb[1] / sizeof(float);
    a.dst_s2          = dst->nb[2] / sizeof(float);
    a.dst_s3          = dst->nb[3] / sizeof(float);
    if (ids) {
        a.ids_s0 = ids->nb[0] / sizeof(int);
        a.ids_s1 = ids->nb[1] / sizeof(int);
    }
    const dim3 grid((a.n_rows + TBQ_MATVEC_WARPS - 1) / TBQ_MATVEC_WARPS, ids ? ids->ne[0] : src1->ne[2],
                    ids ? ids->ne[1] : src1->ne[3]);
    const ggml_cuda_kernel_launch_params launch(grid, dim3(32 * TBQ_MATVEC_WARPS), 0, stream);
    dispatch_bits(src0->type, [&](auto bits) {
        switch (a.n_cols) {
            case 1: ggml_cuda_kernel_launch(tbq_matvec<bits, 1>, launch, a); break;
            case 2: ggml_cuda_kernel_launch(tbq_matvec<bits, 2>, launch, a); break;
            case 3: ggml_cuda_kernel_launch(tbq_matvec<bits, 3>, launch, a); break;
            case 4: ggml_cuda_kernel_launch(tbq_matvec<bits, 4>, launch, a); break;
            case 5: ggml_cuda_kernel_launch(tbq_matvec<bits, 5>, launch, a); break;
            case 6: ggml_cuda_kernel_launch(tbq_matvec<bits, 6>, launch, a); break;
            case 7: ggml_cuda_kernel_launch(tbq_matvec<bits, 7>, launch, a); break;
            default: ggml_cuda_kernel_launch(tbq_matvec<bits, 8>, launch, a); break;
        }
    });
    CUDA_CHECK(cudaGetLastError());
    return true;
}

// --- attention -----------------------------------------------------------------------------------------------------

// llama.cpp's own kernels have no soft-cap for head size 64, so this one takes prompts there too.
static bool only_native(const ggml_tensor * dst) {
    float logit_softcap;
    memcpy(&logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    return logit_softcap != 0.0f && dst->src[0]->ne[0] != 128 && dst->src[0]->ne[0] != 256 && dst->src[0]->ne[0] != 512;
}

// Whether exact rows and a mean, if there are any, can be read.  Neither way of computing this node leaves them out: it is
// refused if not.
static bool exact_and_center_supported(const ggml_tensor * dst) {
    for (const ggml_tensor * e : { dst->src[5], dst->src[6] }) {
        if (e && (e->nb[0] != sizeof(block_tbq8_0) ||
                  (e->nb[1] | e->nb[2] | e->nb[3] | e->view_offs) % sizeof(float) != 0)) {
            return false;
        }
    }
    return tbq_ggml_flash_attn_ext_valid(dst);
}

bool tbq_cuda_flash_attn_ext_converts(const ggml_tensor * dst) {
    return !(ggml_is_tbq(dst->src[1]->type) || ggml_is_tbq(dst->src[2]->type)) ||
           (!only_native(dst) && exact_and_center_supported(dst));
}

// More columns than this are a prompt where the cache is converted: converting it once takes less work than unpacking it
// for every 16.
#define TBQ_ATTENTION_MAX_COLUMNS 64

static int64_t n_columns(const ggml_tensor * dst) {
    return dst->src[0]->ne[1] * (dst->src[0]->ne[2] / dst->src[1]->ne[2]);
}

// What all kernels need of tensors, whatever the head sizes.
static bool layout_supported(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    if (kv_bits(k->type) == 0 || kv_bits(v->type) == 0) {
        return false;
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->nb[1] % 4 || q->nb[2] % 4 || q->nb[3] % 4 ||
        !ggml_is_contiguous(dst) || k->ne[1] == 0 || q->ne[3] > 65535 || k->ne[2] != v->ne[2] || k->ne[3] != v->ne[3] ||
        q->ne[3] % k->ne[3] != 0 || (mask && mask->ne[2] != 1) || !exact_and_center_supported(dst)) {
        return false;
    }
    for (const ggml_tensor * t : { k, v }) {
        // heads at multiples of their own size, rows where 32-bit arithmetic reaches
        const size_t align = tbq_attention_align(t->ne[0], kv_bits(t->type));
        for (int i = 1; i < 4; i++) {
            if (t->nb[i] % align != 0) {
                return false;
            }
        }
        if (t->nb[0] != ggml_type_size(t->type) || t->nb[1] >= 1 << 27 || t->view_offs % align != 0) {
            return false;
        }
    }
    return true;
}

// What the kernels of prompts and those of decode for equal head sizes need.
static bool native_supported(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int64_t       d = k->ne[0];
    return (ggml_is_tbq(k->type) || ggml_is_tbq(v->type)) && (d == 64 || d == 128 || d == 256) && v->ne[0] == d &&
           layout_supported(dst);
}

#ifdef GGML_TBQ_CUDA_PROMPT
// Whether tbq-prompt.cu has kernels for this device.  Only devices that could have them are touched.
static bool has_prompt_kernels(int device) {
    static const std::vector<bool> has = [] {
        const int         current = ggml_cuda_get_device();
        std::vector<bool> list(ggml_cuda_info().device_count);
        for (size_t i = 0; i < list.size(); i++) {
            if (ggml_cuda_info().devices[i].cc == GGML_CUDA_CC_HOPPER) {
                ggml_cuda_set_device(i);
                list[i] = tbq_prompt_compiled();
            }
        }
        ggml_cuda_set_device(current);
        return list;
    }();
    return has[device];
}

// A tile of its kernels has 64 columns, however few there are; those of decode take as long for each 16 columns, and start
// faster (docs/design/cuda.md).
static bool prompt_faster(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    return n_columns(dst) > 32 && n_columns(dst) * k->ne[1] * k->ne[2] * dst->src[0]->ne[3] > 1 << 22;
}

// By tbq-prompt.cuh.
static bool prompt_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    return prompt_faster(dst) && ggml_is_tbq(k->type) && ggml_is_tbq(dst->src[2]->type) && has_prompt_kernels(device) &&
           k->ne[1] <= tbq_prompt_max_kv(q->ne[0]) && n_columns(dst) <= TBQ_PROMPT_MAX_ROWS &&
           (!dst->src[3] || dst->src[3]->ne[3] <= 65535) && k->nb[1] < TBQ_PROMPT_MAX_STRIDE &&
           dst->src[2]->nb[1] < TBQ_PROMPT_MAX_STRIDE;
}
#else
static bool has_prompt_kernels(int) {
    return false;
}

static bool prompt_faster(const ggml_tensor *) {
    return false;
}

static bool prompt_supported(int, const ggml_tensor *) {
    return false;
}
#endif

// By tbq-attention.cuh.
static bool decode_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * k  = dst->src[1];
    const int64_t       d  = dst->src[0]->ne[0];
    const int           cc = ggml_cuda_info().devices[device].cc;
    if (!GGML_CUDA_CC_IS_NVIDIA(cc) || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_AMPERE) {
        return false;
    }
    // some pairs at head size 256 do not fit into the 99 KiB of sm_86, sm_89 and sm_120
    const int bits_k = kv_bits(k->type), bits_v = kv_bits(dst->src[2]->type);
    if ((size_t) tbq_attention_smem(d, bits_k, bits_v, 16) + tbq_attention_static_smem(d, bits_k, 16) >
        ggml_cuda_info().devices[device].smpbo) {
        return false;
    }
    // limits of a grid
    return (n_columns(dst) + 7) / 8 * k->ne[2] <= 65535 &&
           (n_columns(dst) <= TBQ_ATTENTION_MAX_COLUMNS || only_native(dst) ||
            (ggml_is_tbq(k->type) && ggml_is_tbq(dst->src[2]->type) && has_prompt_kernels(device) &&
             !prompt_faster(dst)));
}

// The first channels of a's rows, of the same rows.
static bool is_start_of(const ggml_tensor * part, const ggml_tensor * a) {
    return part->view_src &&
           (part->view_src == a || (part->view_src == a->view_src && part->view_offs == a->view_offs));
}

// The values are the first channels of the keys (MLA).
static bool values_in_keys(const ggml_tensor * dst) {
    return is_start_of(dst->src[2], dst->src[1]);
}

// The shape of a call and where its tensors are.
static tbq_attention_args attention_args(const ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    const ggml_tensor * mean  = dst->src[8];

    tbq_attention_args a = {};
    a.q                  = (const char *) q->data;
    a.k                  = (const char *) k->data;
    a.v                  = (const char *) v->data;
    a.mask               = mask ? (const char *) mask->data : nullptr;
    a.sinks              = sinks ? (const float *) sinks->data : nullptr;
    a.mean               = mean ? (const float *) mean->data : nullptr;
    a.mean_of_values     = tbq_ggml_flash_attn_ext_center_values(dst);
    a.dst                = (float *) dst->data;
    memcpy(&a.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a.logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    a.n_q        = q->ne[1];
    a.n_head     = q->ne[2];
    a.n_seq      = q->ne[3];
    a.n_kv       = k->ne[1];
    a.n_head_kv  = k->ne[2];
    a.n_seq_kv   = k->ne[3];
    a.n_seq_mask = mask ? mask->ne[3] : 1;
    a.q_nb1 = q->nb[1], a.q_nb2 = q->nb[2], a.q_nb3 = q->nb[3];
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2], a.v_nb3 = v->nb[3];
    if (mask) {
        a.mask_nb1 = mask->nb[1];
        a.mask_nb3 = mask->nb[3];
    }
    if (const ggml_tensor * cells = dst->src[7]) {
        a.cells   = (const int *) cells->data;
        a.n_exact = (int) (cells->ne[0] - (k->ne[1] + 31) / 32);
        if (const ggml_tensor * e = dst->src[5]) {
            a.exact_k     = (const char *) e->data;
            a.exact_k_nb1 = e->nb[1], a.exact_k_nb2 = e->nb[2], a.exact_k_nb3 = e->nb[3];
        }
        if (const ggml_tensor * e = dst->src[6]) {
            a.exact_v     = (const char *) e->data;
            a.exact_v_nb1 = e->nb[1], a.exact_v_nb2 = e->nb[2], a.exact_v_nb3 = e->nb[3];
        }
    }
    return a;
}

// By tbq-attention-heads.cuh.  Only what llama.cpp's kernels take when it is converted, so that a layer's prompts and
// decode run on the same device: who asks whether a node is supported is not told of this.
static bool heads_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * k  = dst->src[1];
    const ggml_tensor * v  = dst->src[2];
    const int           cc = ggml_cuda_info().devices[device].cc;
    if (!ggml_is_tbq(k->type) || !ggml_is_tbq(v->type) || only_native(dst) || !layout_supported(dst) ||
        !GGML_CUDA_CC_IS_NVIDIA(cc) || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_AMPERE) {
        return false;
    }
    const bool latent = k->ne[0] == 576;
    if (latent) {
        for (int i = 1; i < GGML_MAX_DIMS; i++) {
            const ggml_tensor * exact_k = dst->src[5];
            const ggml_tensor * exact_v = dst->src[6];
            if ((k->ne[i] > 1 && v->nb[i] != k->nb[i]) ||
                (exact_k && (!exact_v || (exact_k->ne[i] > 1 && exact_v->nb[i] != exact_k->nb[i])))) {
                return false;
            }
        }
        if (!values_in_keys(dst) || v->type != k->type || (dst->src[5] && !is_start_of(dst->src[6], dst->src[5]))) {
            return false;
        }
    }
    return k->nb[1] < TBQ_HEADS_MAX_STRIDE && v->nb[1] < TBQ_HEADS_MAX_STRIDE &&
           n_columns(dst) <= (latent ? TBQ_HEADS_MAX_COLUMNS_LATENT : TBQ_HEADS_MAX_COLUMNS) &&
           n_columns(dst) * k->ne[2] <= 65535 && // a grid
           tbq_heads_fits(device, k->ne[0], v->ne[0], attention_args(dst), kv_bits(k->type), kv_bits(v->type));
}

bool tbq_cuda_flash_attn_ext_reads_packed(int device, const ggml_tensor * dst) {
    return tbq_cuda_flash_attn_ext_supported(device, dst) || heads_supported(device, dst);
}

bool tbq_cuda_flash_attn_ext_supported(int device, const ggml_tensor * dst) {
#ifndef FLASH_ATTN_AVAILABLE
    return false; // a prompt would have no kernel
#endif
    return native_supported(dst) && (prompt_supported(device, dst) || decode_supported(device, dst));
}

// K or V of `dst` as f16 at `to`, with its exact rows at their cells, and with the mean that its rows lack.
static ggml_tensor to_f16_whole(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, int side, half * to) {
    const ggml_tensor * t     = dst->src[side];
    const ggml_tensor * mean  = side == 1 || tbq_ggml_flash_attn_ext_center_values(dst) ? dst->src[8] : nullptr;
    const ggml_tensor * exact = dst->src[side + 4];
    const ggml_tensor * cells = dst->src[7];

    ggml_tensor result = *t;
    result.type        = GGML_TYPE_F16;
    result.data        = to;
    result.view_src    = nullptr;
    result.nb[0]       = sizeof(half);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        result.nb[i] = result.nb[i - 1] * t->ne[i - 1];
    }
    tbq_decode_args a = {};
    a.dst             = to;
    a.mean            = mean ? (const float *) mean->data : nullptr;
    a.mean_s2         = mean ? mean->ne[0] : 0;
    if (ggml_is_tbq(t->type)) {
        a.src  = (const char *) t->data;
        a.from = rows_of(t, t, 1);
        a.to   = rows_of(t, &result, sizeof(half));
        decode<half>(t->type, a, ctx.stream());
    } else {
        const size_t unit = ggml_type_size(t->type);
        ggml_get_to_fp16_nc_cuda(t->type)(t->data, to, t->ne[0], t->ne[1], t->ne[2], t->ne[3], t->nb[1] / unit,
                                          t->nb[2] / unit, t->nb[3] / unit, ctx.stream());
    }
    if (exact) {
        a.src  = (const char *) exact->data;
        a.from = rows_of(exact, exact, 1);
        a.to   = rows_of(exact, &result, sizeof(half));
        decode_exact<half>(a, (const int *) cells->data, cells->ne[0], ctx.stream());
    }
    return result;
}

// Converts K and V to f16, exact rows and centered keys too, for the backend's own kernels.  (Without either these
// convert.)  Whole keys need no mean any more.
static bool flash_attn_ext_converted(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (!dst->src[7] && !dst->src[8]) {
        return false;
    }
    GGML_ASSERT(tbq_cuda_flash_attn_ext_converts(dst));
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * v      = dst->src[2];
    const bool          v_in_k = values_in_keys(dst);

    // where the backend would convert them: ggml_cuda_flash_attn_ext_get_alloc_size() has reserved it
    const uintptr_t k_f16 = GGML_PAD((uintptr_t) dst->data + ggml_nbytes(dst), 128);
    const uintptr_t v_f16 =
        k->type == GGML_TYPE_F16 ? k_f16 : GGML_PAD(k_f16 + ggml_nelements(k) * sizeof(half), (uintptr_t) 128);

    ggml_tensor f16 = *dst, k_as_f16 = *k, v_as_f16 = *v;
    if (k->type != GGML_TYPE_F16) {
        k_as_f16 = to_f16_whole(ctx, dst, 1, (half *) k_f16);
    }
    if (v_in_k) {
        v_as_f16       = k_as_f16;
        v_as_f16.ne[0] = v->ne[0];
        // what the kernels look at to read them once
        v_as_f16.view_src  = &k_as_f16;
        v_as_f16.view_offs = 0;
    } else if (v->type != GGML_TYPE_F16) {
        v_as_f16 = to_f16_whole(ctx, dst, 2, (half *) v_f16);
    }
    f16.src[1] = &k_as_f16;
    f16.src[2] = &v_as_f16;
    f16.src[5] = f16.src[6] = f16.src[7] = f16.src[8] = nullptr;
    ggml_cuda_flash_attn_ext(ctx, &f16);
    return true;
}

// beside: for kernels of decode only
static void flash_attn_ext_native(ggml_backend_cuda_context & ctx, ggml_tensor * dst,
                                  const tbq_attention_beside & beside) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    tbq_prompt_args a                    = {};
    static_cast<tbq_attention_args &>(a) = attention_args(dst);
#ifdef GGML_TBQ_CUDA_PROMPT
    if (prompt_supported(ctx.device, dst)) {
        a.bits_k = kv_bits(k->type);
        a.bits_v = kv_bits(v->type);
        tbq_prompt_partition(a, q->ne[0], ggml_cuda_info().devices[ctx.device].nsm);
        ggml_cuda_pool_alloc<char> memory(ctx.pool(), tbq_prompt_place(a, q->ne[0], nullptr));
        tbq_prompt_place(a, q->ne[0], memory.ptr);
        CUDA_CHECK(tbq_prompt_launch(a, q->ne[0], ctx.stream()));
        return;
    }
#endif
#define TBQ_CASE(K, V) \
    case 100 * K + V: tbq_attention_##K##_##V(ctx, q->ne[0], a, beside); break;
    switch (100 * kv_bits(k->type) + kv_bits(v->type)) {
        TBQ_ATTENTION_PAIRS(TBQ_CASE)
        default: GGML_ABORT("fatal error");
    }
}

static bool flash_attn_ext(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (heads_supported(ctx.device, dst)) {
        const ggml_tensor * k = dst->src[1];
        const ggml_tensor * v = dst->src[2];
        tbq_heads_launch(ctx, k->ne[0], v->ne[0], attention_args(dst), kv_bits(k->type), kv_bits(v->type));
        return true;
    }
    if (!tbq_cuda_flash_attn_ext_supported(ctx.device, dst)) {
        return flash_attn_ext_converted(ctx, dst);
    }
    flash_attn_ext_native(ctx, dst, nullptr);
    return true;
}

// --- keys, values and attention of a token together ------------------------------------------------------------------

static const ggml_tensor * root(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// Few enough blocks for a CTA each where attention waits for their exact rows alone.
#define TBQ_MAX_BLOCKS_BESIDE 4096

// Whether attn reads the exact rows that k and v (SET_ROWS) write: then it hides the packed rows of the same cells, so these
// may be written while it runs.  Blocks without a slot for an exact row are written before it.
static bool reads_exact_rows_of(int device, const ggml_tensor * attn, const ggml_tensor * k, const ggml_tensor * v) {
    auto same = [](const ggml_tensor * a, const ggml_tensor * b) { return a && b && root(a) == root(b); };
    return ggml_cuda_highest_compiled_arch(ggml_cuda_info().devices[device].cc) >= GGML_CUDA_CC_HOPPER &&
           (attn->flags & GGML_TENSOR_FLAG_COMPUTE) && attn->src[7] && same(attn->src[1], k) && same(attn->src[2], v) &&
           same(attn->src[5], k->src[5]) && same(attn->src[6], v->src[5]) && native_supported(attn) &&
           !prompt_supported(device, attn) && decode_supported(device, attn);
}

// All of t, or nothing if that is too much to ask for at once.
static tbq_ahead ahead_of(const ggml_tensor * t) {
    const size_t bytes = t ? ggml_nbytes(t) / 16 * 16 : 0;
    return bytes > 0 && bytes <= 4 << 20 && (uintptr_t) t->data % 16 == 0
               ? tbq_ahead{ (const char *) t->data, (unsigned) bytes }
               : tbq_ahead{};
}

// The keys and the values of a few tokens in one launch, with the rotary embedding of the keys where that is right before;
// and attention, if it is right behind and reads their exact rows.
int tbq_cuda_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    auto ours = [](const ggml_tensor * t) {
        return t->op == GGML_OP_SET_ROWS && ggml_is_tbq(t->type) && t->src[0]->type == GGML_TYPE_F32 &&
               (t->flags & GGML_TENSOR_FLAG_COMPUTE);
    };
    // on other streams than the first, keys and values are branches that do not wait for each other
    if (ctx.curr_stream_no != 0) {
        return 0;
    }
    if (const int n = fuse_center(ctx, graph, i)) {
        return n;
    }
    tbq_rope_args       rope = {};
    const ggml_tensor * k    = graph->nodes[i];
    int                 last = i;
    if (k->op == GGML_OP_ROPE) {
        // its result must go to the cache and nowhere else, all heads of a token in a row
        if (i + 2 >= graph->n_nodes || !ours(graph->nodes[i + 2]) ||
            !ggml_can_fuse_subgraph(graph, i, { GGML_OP_ROPE, GGML_OP_VIEW, GGML_OP_SET_ROWS }, { i + 2 })) {
            return 0;
        }
        const ggml_tensor * view = graph->nodes[i + 1];
        last                     = i + 2;
        if (graph->nodes[last]->src[0] != view || view->view_src != k || view->view_offs != 0 ||
            view->ne[0] != k->ne[0] * k->ne[1] || view->ne[1] != k->ne[2] || view->ne[2] * view->ne[3] != 1 ||
            !ggml_is_contiguous(k) || !rope_args(k, rope)) {
            return 0;
        }
        k = graph->nodes[last];
    } else if (!ours(k)) {
        return 0;
    }
    tbq_pair_args     p = {};
    tbq_encode_args & a = p.a;
    tbq_encode_args & b = p.b;
    a                   = set_rows_args(k);
    if (rope.head_size) {
        const ggml_tensor * x = graph->nodes[i]->src[0];
        a.src                 = x->data;
        a.from.s[0]           = x->nb[2] / sizeof(float);
        p.rope                = rope;
    }
    if (a.from.n_blocks() == 0 || a.from.n_blocks() > TBQ_MAX_BLOCKS_BESIDE) {
        return 0;
    }

    // the values, if they are next
    const int           j = next_node(graph, last);
    const ggml_tensor * v = j < graph->n_nodes && ours(graph->nodes[j]) ? graph->nodes[j] : nullptr;
    if (v) {
        // two caches with exact rows of their own, and the second reads nothing that the first writes
        b                 = set_rows_args(v);
        auto written_by_k = [&](const ggml_tensor * t) {
            return t && (root(t) == root(k) || (k->src[5] && root(t) == root(k->src[5])));
        };
        if (written_by_k(v) || written_by_k(v->src[0]) || written_by_k(v->src[1]) || written_by_k(v->src[5]) ||
            written_by_k(v->src[6]) || b.from.n_blocks() == 0 || b.from.n_blocks() > TBQ_MAX_BLOCKS_BESIDE) {
            v = nullptr;
        }
    }
    const int     m = next_node(graph, v ? j : last);
    ggml_tensor * attn =
        m < graph->n_nodes && graph->nodes[m]->op == GGML_OP_FLASH_ATTN_EXT ? graph->nodes[m] : nullptr;
    if (attn) {
        const ggml_tensor * t[] = {
            attn->src[7], attn->src[3], attn->src[5], attn->src[6], attn->src[1], attn->src[2]
        };
        for (int r = 0; r < TBQ_N_AHEAD; r++) {
            p.ahead[r] = ahead_of(t[r]);
        }
    }
    if (attn && !(v && reads_exact_rows_of(ctx.device, attn, k, v))) {
        attn = nullptr;
    }
    if (!attn && (!is_decode_size(a) || (v && !is_decode_size(b)) || (!v && !rope.head_size))) {
        return 0;
    }
    p.n_a             = (int) a.from.n_blocks();
    const int  n      = p.n_a + (v ? (int) b.from.n_blocks() : 0);
    const auto launch = [&](tbq_encode_part part, bool with_rope) {
        p.part = part;
        dispatch_bits(k->type, [&](auto bits_k) {
            dispatch_bits(v ? v->type : k->type, [&](auto bits_v) {
                ggml_cuda_kernel_launch(
                    with_rope ? tbq_quantize_pair<bits_k, bits_v, true> : tbq_quantize_pair<bits_k, bits_v, false>,
                    ggml_cuda_kernel_launch_params(dim3((unsigned) n), dim3(TBQ_DECODE_SIZE_THREADS), 0, ctx.stream()),
                    p);
            });
        });
        CUDA_CHECK(cudaGetLastError());
    };
    if (!attn) {
        launch(TBQ_ENCODE_WHOLE, rope.head_size != 0);
        return (v ? j : last) - i;
    }
    ggml_cuda_pool_alloc<tbq_stored_block> stored(ctx.pool(), (size_t) n);
    p.stored = stored.ptr;
    launch(TBQ_ENCODE_EXACT, rope.head_size != 0);
    flash_attn_ext_native(ctx, attn, [&] { launch(TBQ_ENCODE_PACKED, false); });
    return m - i;
}

// --- what the backend asks for, and what it promises -----------------------------------------------------------------

bool tbq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_SET_ROWS: return set_rows(ctx, dst);
        case GGML_OP_CONCAT: return concat(ctx, dst);
        case GGML_OP_CPY: return cpy(ctx, dst->src[0], dst->src[1]);
        case GGML_OP_GET_ROWS: return get_rows(ctx, dst);
        case GGML_OP_MUL_MAT: return mul_mat(ctx, dst->src[0], dst->src[1], nullptr, dst);
        case GGML_OP_MUL_MAT_ID: return mul_mat(ctx, dst->src[0], dst->src[1], dst->src[2], dst);
        case GGML_OP_FLASH_ATTN_EXT: return flash_attn_ext(ctx, dst);
        default: return false;
    }
}

bool tbq_cuda_kv_type_supported(ggml_type type) {
    return ggml_is_tbq(type);
}

// Exact rows beside the packed ones, if there are any.
static bool set_rows_exact_supported(const ggml_tensor * op) {
    const ggml_tensor * exact = op->src[5];
    const ggml_tensor * slots = op->src[6];
    if (!exact || !slots) {
        return !exact && !slots;
    }
    return exact->type == GGML_TYPE_TBQ8_0 && exact->ne[0] == op->src[0]->ne[0] &&
           exact->nb[0] == sizeof(block_tbq8_0) && (exact->nb[1] | exact->view_offs) % sizeof(float) == 0 &&
           slots->type == GGML_TYPE_I32 && ggml_is_contiguous(slots) && op->op_params[0] >= 0 &&
           op->op_params[0] + ggml_nrows(op->src[0]) <= ggml_nelements(slots);
}

bool tbq_cuda_supports_op(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return ggml_is_tbq(a->type) && b->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 &&
                   a->nb[0] == ggml_type_size(a->type) && b->nb[0] == sizeof(float);
        case GGML_OP_GET_ROWS:
            return is_cached(a->type) && b->type == GGML_TYPE_I32 &&
                   (op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16 || op->type == GGML_TYPE_BF16);
        case GGML_OP_SET_ROWS:
            return ggml_is_tbq(op->type) && (a->type == GGML_TYPE_F32 || a->type == GGML_TYPE_F16) &&
                   a->nb[0] == ggml_type_size(a->type) && (b->type == GGML_TYPE_I32 || b->type == GGML_TYPE_I64) &&
                   set_rows_exact_supported(op);
        case GGML_OP_CONCAT:
            return op->type == GGML_TYPE_TBQ8_0 && op->op_params[0] == 1 && a->type == GGML_TYPE_TBQ8_0 &&
                   b->type == GGML_TYPE_F32 && a->ne[0] == b->ne[0] && a->nb[0] == sizeof(block_tbq8_0) &&
                   b->nb[0] == sizeof(float) &&
                   (a->nb[1] | a->nb[2] | a->nb[3] | a->view_offs | b->nb[1] | b->nb[2] | b->nb[3]) % sizeof(float) ==
                       0;
        case GGML_OP_CPY:
            // b is where it goes
            return ((is_cached(a->type) && b->type == GGML_TYPE_F32) ||
                    (a->type == GGML_TYPE_F32 && is_cached(b->type))) &&
                   ggml_are_same_shape(a, b) && a->nb[0] == ggml_type_size(a->type) &&
                   b->nb[0] == ggml_type_size(b->type) &&
                   (b->type != GGML_TYPE_F32 ||
                    (b->nb[1] | b->nb[2] | b->nb[3] | b->view_offs) % 16 == 0); // four values at once
        default: return false;
    }
}
