// SPDX-License-Identifier: MIT
#include "tbq-ggml-vulkan.h"

#include "tbq-ggml.h"

// --- shaders ---------------------------------------------------------------------------------------------------------

// glslc writes the words of a module as an initializer.
static const uint32_t tbq_quantize_code[] =
#include "tbq-quantize.spv.inc"
    ;
static const uint32_t tbq_dequantize_code[] =
#include "tbq-dequantize.spv.inc"
    ;
static const uint32_t tbq_attention_code[] =
#include "tbq-attention.spv.inc"
    ;
static const uint32_t tbq_attention_merge_code[] =
#include "tbq-attention-merge.spv.inc"
    ;
static const uint32_t tbq_rotate_code[] =
#include "tbq-rotate.spv.inc"
    ;
static const uint32_t tbq_matvec_code[] =
#include "tbq-matvec.spv.inc"
    ;

namespace {

struct shader {
    uint32_t         id;
    const char *     name;
    const uint32_t * code;
    size_t           code_size;
    uint32_t         n_buffers;
};

const shader quantize_shader   = { 0, "tbq_quantize", tbq_quantize_code, sizeof(tbq_quantize_code), 9 };
const shader dequantize_shader = { 1, "tbq_dequantize", tbq_dequantize_code, sizeof(tbq_dequantize_code), 4 };
const shader attention_shader  = { 2, "tbq_attention", tbq_attention_code, sizeof(tbq_attention_code), 11 };
const shader merge_shader = { 3, "tbq_attention_merge", tbq_attention_merge_code, sizeof(tbq_attention_merge_code), 4 };
const shader rotate_shader = { 4, "tbq_rotate", tbq_rotate_code, sizeof(tbq_rotate_code), 2 };
const shader matvec_shader = { 5, "tbq_matvec", tbq_matvec_code, sizeof(tbq_matvec_code), 6 };

// Arguments of the shaders, which name the fields.
struct quantize_args {
    uint32_t ne[4];
    uint32_t from[3], src_at;
    uint32_t to[3], dst_at;
    uint32_t ids_s[3], flags;
    uint32_t ids_ne[2];
    uint32_t exact_s1, slots_at;
    uint32_t at_ids_mean_weight_exact, at_pos_factors;
    uint32_t rope_dims, rope_s_head;
    float    theta_scale, freq_scale, ext_factor, attn_factor, corr[2];
};

static_assert(sizeof(quantize_args) <= 128, "what every device has for push constants");

enum quantize_flags { HAS_IDS = 1, HAS_MEAN = 2, HAS_WEIGHTS = 4, HAS_EXACT = 8, HAS_FACTORS = 16 };

struct dequantize_args {
    uint32_t ne[4];
    uint32_t from[3], src_at;
    uint32_t to[3], dst_at;
    uint32_t rows_s[3], rows_at;
    uint32_t mean_at, mean_s2;
    uint32_t flags;
};

enum dequantize_flags { READS_LISTED = 1, WRITES_LISTED = 2, ADDS_MEAN = 4 };

struct attention_args {
    uint32_t q_s[3], k_s[3], v_s[3];
    uint32_t mask_s1, mask_s3, mask_ne3;
    uint32_t exact_k_s1, exact_k_s3, exact_v_s1, exact_v_s3;
    uint32_t cells_s1, n_exact;
    uint32_t at_q_mask, at_k_v, at_exact, at_cells_mean, at_result_sinks;
    uint32_t n_kv, rows_per_split;
    uint32_t n_q, heads, n_seq_kv;
    float    scale, max_bias, softcap;
    uint32_t flags;
};

static_assert(sizeof(attention_args) <= 128, "what every device has for push constants");

enum attention_flags { HAS_MASK = 1, LOGITS_LACK_MEAN = 2, ATTENTION_HAS_SINKS = 4, ATTENTION_VALUES_LACK_MEAN = 8 };

struct merge_args {
    uint32_t n_columns, n_splits, blocks;
    uint32_t n_head, gqa;
    uint32_t result_at, sinks_at, mean_at, mean_s;
    uint32_t flags;
};

struct rotate_args {
    uint32_t ne[4];
    uint32_t from[3], src_at;
};

struct matvec_args {
    uint32_t n_rows, blocks;
    uint32_t w_s[3];
    uint32_t w_at;
    uint32_t ne2;
    uint32_t ratio[2];
    uint32_t ids_s1, ids_at;
    uint32_t act_ne1;
    uint32_t result_at, sum_at[2];
    uint32_t flags;
};

enum matvec_flags { MATVEC_HAS_IDS = 1, MATVEC_HAS_SUM_0 = 2, MATVEC_HAS_SUM_1 = 4 };

enum merge_flags { HAS_SINKS = 1, VALUES_LACK_MEAN = 2 };

} // namespace

// The pipeline of a shader with these specialization constants, compiled when it is first asked for.
static vk_pipeline get_pipeline(ggml_backend_vk_context * ctx, const shader & s, size_t args_size,
                                const std::vector<uint32_t> & constants) {
    vk_device &                           device = ctx->device;
    std::lock_guard<std::recursive_mutex> lock(device->mutex);
    std::vector<uint32_t>                 key = constants;
    key.push_back(s.id);
    vk_pipeline & pipeline = device->pipeline_tbq[key];
    if (!pipeline) {
        vk_pipeline p         = std::make_shared<vk_pipeline_struct>();
        p->name               = s.name;
        p->parameter_count    = s.n_buffers;
        p->push_constant_size = (uint32_t) args_size;
        p->wg_denoms          = { 1, 1, 1 };
        p->align              = 1;
        p->initialized        = true;
        ggml_vk_create_pipeline_func(device, p, s.code_size, s.code, "main", s.n_buffers, p->wg_denoms, constants,
                                     false, false, 0);
        pipeline = p;
    }
    return pipeline;
}

template <typename T>
static void dispatch(ggml_backend_vk_context * ctx, vk_context & subctx, const shader & s,
                     const std::vector<uint32_t> & constants, std::initializer_list<vk::DescriptorBufferInfo> buffers,
                     const T & args, std::array<uint32_t, 3> workgroups) {
    vk_pipeline pipeline = get_pipeline(ctx, s, sizeof(T), constants);
    ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
    ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, buffers, args, workgroups);
}
// A device takes at least 65535 workgroups in each dimension; most shaders put two of them together.
static std::array<uint32_t, 3> in_two_dimensions(uint64_t n_workgroups) {
    constexpr uint64_t MAX_X = 32768;
    return { (uint32_t) std::min(n_workgroups, MAX_X), (uint32_t) ((n_workgroups + MAX_X - 1) / MAX_X), 1 };
}

// --- tensors ---------------------------------------------------------------------------------------------------------

static bool is_cached(ggml_type type) {
    return ggml_is_tbq(type) || type == GGML_TYPE_TBQ8_0;
}

// Bits of an index; 8 for tbq8_0.
static uint32_t bits_of(ggml_type type) {
    return type == GGML_TYPE_TBQ8_0 ? 8 : 2 + type - GGML_TYPE_TBQ2_0;
}

namespace {

// A tensor as a shader finds it: a buffer that begins where the device allows, and the first element in it.
struct place {
    vk_subbuffer buffer;
    uint32_t     at;

    // unit: the bytes of what the shader counts
    place(const ggml_backend_vk_context * ctx, const ggml_tensor * t, size_t unit)
        : buffer(ggml_vk_tensor_subbuffer(ctx, t, true)) {
        const uint32_t bytes = get_misalign_bytes(ctx, t);
        GGML_ASSERT(bytes % unit == 0);
        at = (uint32_t) (bytes / unit);
    }
};

} // namespace

// Whole blocks in a row, and places in 32 bits.
static bool has_rows(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type) && ggml_nbytes(t) < UINT32_MAX;
}

// The shape in blocks, and the strides in units.
static void fill_shape(uint32_t (&ne)[4], const ggml_tensor * t) {
    ne[0] = (uint32_t) (t->ne[0] / TBQ_BLOCK);
    for (int i = 1; i < 4; i++) {
        ne[i] = (uint32_t) t->ne[i];
    }
}

static void fill_strides(uint32_t (&s)[3], const ggml_tensor * t, size_t unit) {
    for (int i = 0; i < 3; i++) {
        s[i] = (uint32_t) (t->nb[i + 1] / unit);
    }
}

static uint64_t n_blocks(const uint32_t (&ne)[4]) {
    return (uint64_t) ne[0] * ne[1] * ne[2] * ne[3];
}

// A contiguous f16 tensor of this shape, which lies nowhere.
static ggml_tensor as_f16(const ggml_tensor * t) {
    ggml_tensor f16 = *t;
    f16.type        = GGML_TYPE_F16;
    f16.view_src    = nullptr;
    f16.view_offs   = 0;
    f16.nb[0]       = sizeof(ggml_fp16_t);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        f16.nb[i] = f16.nb[i - 1] * t->ne[i - 1];
    }
    return f16;
}

// Tensors of f16 in the backend's scratch memory, as its own kernels take them.
namespace {

struct scratch {
    ggml_backend_vk_buffer_context context;
    ggml_backend_buffer            buffer;
    size_t                         used = 0;

    // what it will hold altogether is `size`
    scratch(ggml_backend_vk_context * ctx, vk_context & subctx, size_t size)
        : context(ctx->device, reserve(ctx, subctx, size), ctx->name), buffer() {
        buffer.context = &context;
        buffer.size    = size;
    }

    ~scratch() { context.dev_buffer = nullptr; } // it stays the backend's

    // of t's shape, contiguous
    ggml_tensor tensor(const ggml_tensor * t) {
        ggml_tensor f16 = as_f16(t);
        f16.buffer      = &buffer;
        f16.data        = (char *) vk_ptr_base + used;
        used += bytes(t);
        return f16;
    }

    static size_t bytes(const ggml_tensor * t) { return GGML_PAD(ggml_nelements(t) * sizeof(ggml_fp16_t), 256); }

private:
    static vk_buffer reserve(ggml_backend_vk_context * ctx, vk_context & subctx, size_t size) {
        if (ctx->prealloc_size_x < size) {
            ctx->prealloc_size_x = size;
            ggml_vk_preallocate_buffers(ctx, subctx);
        }
        if (ctx->prealloc_x_need_sync) {
            ggml_vk_sync_buffers(ctx, subctx);
        }
        return ctx->prealloc_x;
    }
};

} // namespace

// --- values to blocks ------------------------------------------------------------------------------------------------

// Where a tensor begins in its binding, in units of 32 bits, as byte i of a word: devices align bindings to 256 bytes at
// most.
static uint32_t place_byte(const place & p, int i) {
    GGML_ASSERT(p.at < 256);
    return p.at << 8 * i;
}

// How the shader rotates pairs, as its constant; 0: it cannot compute this rotary embedding.
static uint32_t rope_kind(const ggml_tensor * rope) {
    const ggml_tensor * x      = rope->src[0];
    const int32_t *     params = (const int32_t *) rope->op_params;
    const int           n_dims = params[1], mode = params[2], n_offs = params[15];
    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || n_offs != 0 || n_dims % 2 != 0 ||
        n_dims > x->ne[0] || x->type != GGML_TYPE_F32 || x->ne[3] != 1 || x->ne[0] % TBQ_BLOCK != 0 ||
        x->ne[0] > 0xFFFF || !has_rows(x)) {
        return 0;
    }
    return mode == GGML_ROPE_TYPE_NEOX ? 2 : 1;
}

// Rows of values to rows of blocks of dst's type.  rope: the embedding that the values get first, or null; then src is
// its result, which need not be computed.
static void encode(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * src, const ggml_tensor * dst,
                   const ggml_tensor * set_rows, const ggml_tensor * mean, uint64_t skip_rows,
                   const ggml_tensor * rope = nullptr) {
    const size_t  unit = ggml_type_size(src->type);
    quantize_args a    = {};
    fill_shape(a.ne, src);
    fill_strides(a.from, src, unit);
    fill_strides(a.to, dst, 2);
    if (n_blocks(a.ne) == 0) {
        return;
    }
    const place from(ctx, rope ? rope->src[0] : src, unit), to(ctx, dst, 2);
    a.src_at = from.at;
    a.dst_at = to.at + (uint32_t) skip_rows * a.to[0];

    vk_subbuffer ids = from.buffer, means = from.buffer, weights = from.buffer, exact = from.buffer,
                 slots = from.buffer, positions = from.buffer, factors = from.buffer;
    const auto   bind = [&](vk_subbuffer & buffer, const ggml_tensor * t) {
        const place p(ctx, t, sizeof(int32_t));
        buffer = p.buffer;
        return p;
    };
    if (mean) {
        a.at_ids_mean_weight_exact |= place_byte(bind(means, mean), 1);
        a.flags |= HAS_MEAN;
    }
    if (set_rows) {
        const ggml_tensor * t = set_rows->src[1];
        a.at_ids_mean_weight_exact |= place_byte(bind(ids, t), 0);
        for (int i = 0; i < 3; i++) {
            a.ids_s[i] = (uint32_t) (t->nb[i] / sizeof(int32_t));
        }
        a.ids_ne[0] = (uint32_t) t->ne[1];
        a.ids_ne[1] = (uint32_t) t->ne[2];
        a.flags |= HAS_IDS;
        if (const ggml_tensor * w = set_rows->src[4]) {
            a.at_ids_mean_weight_exact |= place_byte(bind(weights, w), 2);
            a.flags |= HAS_WEIGHTS;
        }
        if (const ggml_tensor * e = set_rows->src[5]) {
            a.at_ids_mean_weight_exact |= place_byte(bind(exact, e), 3);
            a.exact_s1 = (uint32_t) (e->nb[1] / sizeof(int32_t));
            a.slots_at = bind(slots, set_rows->src[6]).at + set_rows->op_params[0];
            a.flags |= HAS_EXACT;
        }
    }
    if (rope) {
        const ggml_tensor * x      = rope->src[0];
        const int32_t *     params = (const int32_t *) rope->op_params;
        const int           n_dims = params[1], n_ctx_orig = params[4];
        float               freq_base, beta_fast, beta_slow;
        memcpy(&freq_base, params + 5, sizeof(float));
        memcpy(&a.freq_scale, params + 6, sizeof(float));
        memcpy(&a.ext_factor, params + 7, sizeof(float));
        memcpy(&a.attn_factor, params + 8, sizeof(float));
        memcpy(&beta_fast, params + 9, sizeof(float));
        memcpy(&beta_slow, params + 10, sizeof(float));
        ggml_rope_yarn_corr_dims(n_dims, n_ctx_orig, freq_base, beta_fast, beta_slow, a.corr);
        a.theta_scale    = powf(freq_base, -2.0f / n_dims);
        a.rope_dims      = (uint32_t) n_dims | (uint32_t) x->ne[0] << 16;
        a.rope_s_head    = (uint32_t) (x->nb[1] / sizeof(float));
        a.from[0]        = (uint32_t) (x->nb[2] / sizeof(float));
        a.at_pos_factors = place_byte(bind(positions, rope->src[1]), 0);
        if (rope->src[2]) {
            a.at_pos_factors |= place_byte(bind(factors, rope->src[2]), 1);
            a.flags |= HAS_FACTORS;
        }
    }
    dispatch(ctx, subctx, quantize_shader,
             { bits_of(dst->type), src->type == GGML_TYPE_F16, rope ? rope_kind(rope) : 0 },
             { from.buffer, to.buffer, ids, means, weights, exact, slots, positions, factors }, a,
             in_two_dimensions(n_blocks(a.ne)));
}

// The backend orders operations by their sources and results.  Exact rows are both.
static void await_exact_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * set_rows = graph->nodes[i + ctx->num_additional_fused_ops];
    const ggml_tensor * exact    = set_rows->src[5];
    auto &              read     = ctx->unsynced_nodes_read;

    std::vector<const ggml_tensor *> own; // what ends the list: the sources of this operation
    for (int j = i; j <= i + ctx->num_additional_fused_ops; j++) {
        for (const ggml_tensor * src : graph->nodes[j]->src) {
            if (src) {
                own.push_back(src);
            }
        }
    }
    const auto is_read = [&](const ggml_tensor * t) { return ggml_vk_tensors_overlap(t, exact, false); };
    if (std::any_of(read.begin(), read.end() - std::min(own.size(), read.size()), is_read)) {
        ggml_vk_sync_buffers(ctx, subctx);
        read                        = own;
        ctx->unsynced_nodes_written = { set_rows };
    }
    ctx->unsynced_nodes_written.push_back(exact);
}

bool tbq_vk_depends(const ggml_tensor * later, const ggml_tensor * earlier) {
    const auto root   = [](const ggml_tensor * t) { return t->view_src ? t->view_src : t; };
    const auto writes = [&](const ggml_tensor * t) {
        return t->op == GGML_OP_SET_ROWS && t->src[5] ? root(t->src[5]) : nullptr;
    };
    const auto touches = [&](const ggml_tensor * t, const ggml_tensor * what) {
        if (!what || ggml_op_is_empty(t->op)) {
            return false;
        }
        return root(t) == what || std::any_of(std::begin(t->src), std::end(t->src),
                                              [&](const ggml_tensor * src) { return src && root(src) == what; });
    };
    return touches(later, writes(earlier)) || touches(earlier, writes(later));
}

// SET_ROWS, or a rotary embedding that is fused with it.
static bool set_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * dst  = graph->nodes[i + ctx->num_additional_fused_ops];
    const ggml_tensor * rope = ctx->num_additional_fused_ops ? graph->nodes[i] : nullptr;
    if (dst->op != GGML_OP_SET_ROWS || !ggml_is_tbq(dst->type)) {
        return false;
    }
    if (dst->src[5]) {
        await_exact_rows(ctx, subctx, graph, i);
    }
    encode(ctx, subctx, dst->src[0], dst, dst, dst->src[3], 0, rope);
    return true;
}

bool tbq_vk_can_fuse(const ggml_cgraph * graph, int i) {
    const std::initializer_list<ggml_op> ops = { GGML_OP_ROPE, GGML_OP_VIEW, GGML_OP_SET_ROWS };
    // the embedding's result must go to the cache and nowhere else, all heads of a token in a row
    if (!ggml_can_fuse_subgraph(graph, i, ops, { i + 2 })) {
        return false;
    }
    const ggml_tensor * k    = graph->nodes[i];
    const ggml_tensor * view = graph->nodes[i + 1];
    const ggml_tensor * dst  = graph->nodes[i + 2];
    return ggml_is_tbq(dst->type) && dst->src[0] == view && view->view_src == k && view->view_offs == 0 &&
           view->ne[0] == k->ne[0] * k->ne[1] && view->ne[1] == k->ne[2] && view->ne[2] * view->ne[3] == 1 &&
           ggml_is_contiguous(k) && rope_kind(k) != 0;
}

// Rows of blocks, then rows of values that become blocks, in each of dst's streams.
static bool concat(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    if (dst->type != GGML_TYPE_TBQ8_0) {
        return false;
    }
    const ggml_tensor * before = dst->src[0];
    const size_t        size   = before->ne[1] * before->nb[1];
    vk_subbuffer        from   = ggml_vk_tensor_subbuffer(ctx, before, true);
    vk_subbuffer        to     = ggml_vk_tensor_subbuffer(ctx, dst, true);
    for (int64_t i = 0; i < dst->ne[2] && size > 0; i++) {
        ggml_vk_buffer_copy_async(subctx, to.buffer, to.offset + get_misalign_bytes(ctx, dst) + i * dst->nb[2],
                                  from.buffer, from.offset + get_misalign_bytes(ctx, before) + i * before->nb[2], size);
    }
    encode(ctx, subctx, dst->src[1], dst, nullptr, dst->src[2], before->ne[1]);
    return true;
}

// --- blocks to values ------------------------------------------------------------------------------------------------

// Rows of blocks to rows of values.  rows: a list of rows as `flag` says; mean: of dst's dimension 2.
static void decode(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * src, const ggml_tensor * dst,
                   uint32_t flag = 0, const ggml_tensor * rows = nullptr, const ggml_tensor * mean = nullptr) {
    const size_t    four = 4 * ggml_type_size(dst->type);
    dequantize_args a    = {};
    fill_shape(a.ne, flag == WRITES_LISTED ? src : dst);
    fill_strides(a.from, src, 2);
    fill_strides(a.to, dst, four);
    if (n_blocks(a.ne) == 0) {
        return;
    }
    const place from(ctx, src, 2), to(ctx, dst, four);
    a.src_at = from.at;
    a.dst_at = to.at;
    a.flags  = flag;

    vk_subbuffer list = from.buffer, means = from.buffer;
    if (rows) {
        const place p(ctx, rows, sizeof(int32_t));
        list      = p.buffer;
        a.rows_at = p.at;
        for (int i = 0; i < 3; i++) {
            a.rows_s[i] = (uint32_t) (rows->nb[i] / sizeof(int32_t));
        }
        if (flag == WRITES_LISTED) { // [cells, streams]
            a.rows_s[2] = a.rows_s[1];
        }
    }
    if (mean) {
        const place p(ctx, mean, sizeof(float));
        means     = p.buffer;
        a.mean_at = p.at;
        a.mean_s2 = (uint32_t) mean->ne[0];
        a.flags |= ADDS_MEAN;
    }
    dispatch(ctx, subctx, dequantize_shader, { bits_of(src->type), dst->type == GGML_TYPE_F16 },
             { from.buffer, to.buffer, list, means }, a, in_two_dimensions((n_blocks(a.ne) + 15) / 16));
}

static bool cpy(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    if (is_cached(src->type) && dst->type == GGML_TYPE_F32) {
        decode(ctx, subctx, src, dst);
        return true;
    }
    if (!is_cached(src->type) && is_cached(dst->type)) {
        encode(ctx, subctx, src, dst, nullptr, nullptr, 0);
        return true;
    }
    return false;
}

static bool get_rows(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    if (!is_cached(dst->src[0]->type)) {
        return false;
    }
    decode(ctx, subctx, dst->src[0], dst, READS_LISTED, dst->src[1]);
    return true;
}

// --- operations of the backend on converted tensors ------------------------------------------------------------------

// --- weights in decode -----------------------------------------------------------------------------------------------

// More columns than this are a prompt.
#define TBQ_VK_MAX_VECTORS 8

// MUL_MAT and MUL_MAT_ID of a few columns, from packed weights.
static bool mul_mat_vec(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node   = graph->nodes[i];
    const ggml_tensor * w      = node->src[0];
    const ggml_tensor * x      = node->src[1];
    const ggml_tensor * ids    = node->op == GGML_OP_MUL_MAT_ID ? node->src[2] : nullptr;
    const ggml_tensor * dst    = graph->nodes[i + ctx->num_additional_fused_ops];
    const uint32_t      n_cols = ids ? 1 : (uint32_t) x->ne[1];
    const uint64_t      n_mats = (uint64_t) node->ne[2] * (ids ? node->ne[1] : node->ne[3]);
    if (n_cols > TBQ_VK_MAX_VECTORS || n_mats > 65535 || (ids && node->ne[2] > TBQ_VK_MAX_VECTORS) || !has_rows(x) ||
        !ggml_is_contiguous(dst) || ggml_is_empty(node) || w->nb[1] % 2 != 0 ||
        ctx->num_additional_fused_ops > (ids ? 0 : 2) || (ids && (x->ne[3] != 1 || ids->nb[0] != sizeof(int32_t)))) {
        return false;
    }
    // rotated activations, which the next product may share
    const size_t size = ggml_nelements(x) * sizeof(float);
    if (ctx->prealloc_size_y < size) {
        ctx->prealloc_size_y = size;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }
    rotate_args r = {};
    fill_shape(r.ne, x);
    fill_strides(r.from, x, sizeof(float));
    const vk_subbuffer rotated  = { ctx->prealloc_y, 0, size };
    const vk_pipeline  pipeline = get_pipeline(ctx, rotate_shader, sizeof(r), {});
    if (ctx->prealloc_y_last_pipeline_used != pipeline.get() || ctx->prealloc_y_last_tensor_used != x) {
        if (ctx->prealloc_y_need_sync) {
            ggml_vk_sync_buffers(ctx, subctx);
        }
        const place from(ctx, x, sizeof(float));
        r.src_at = from.at;
        dispatch(ctx, subctx, rotate_shader, {}, { from.buffer, rotated }, r, in_two_dimensions(n_blocks(r.ne)));
        ggml_vk_sync_buffers(ctx, subctx);
        ctx->prealloc_y_last_pipeline_used = pipeline.get();
        ctx->prealloc_y_last_tensor_used   = x;
        ctx->prealloc_y_last_k_padded      = false;
    }

    const place at_w(ctx, w, 2), to(ctx, dst, sizeof(float));
    matvec_args a = {};
    a.n_rows      = (uint32_t) w->ne[1];
    a.blocks      = (uint32_t) (w->ne[0] / TBQ_BLOCK);
    fill_strides(a.w_s, w, 2);
    a.w_at                  = at_w.at;
    a.ne2                   = (uint32_t) (ids ? node->ne[1] : node->ne[2]);
    a.ratio[0]              = ids ? 1 : (uint32_t) (x->ne[2] / w->ne[2]);
    a.ratio[1]              = ids ? 1 : (uint32_t) (x->ne[3] / w->ne[3]);
    a.act_ne1               = (uint32_t) x->ne[1];
    a.result_at             = to.at;
    vk_subbuffer ids_buffer = to.buffer, sums[2] = { to.buffer, to.buffer };
    if (ids) {
        const place p(ctx, ids, sizeof(int32_t));
        ids_buffer = p.buffer;
        a.ids_at   = p.at;
        a.ids_s1   = (uint32_t) (ids->nb[1] / sizeof(int32_t));
        a.flags |= MATVEC_HAS_IDS;
    }
    for (int j = 0; j < ctx->num_additional_fused_ops; j++) { // of the result's shape, as the backend has checked
        const ggml_tensor * add = graph->nodes[i + j + 1];
        const place         p(ctx, add->src[0] == graph->nodes[i + j] ? add->src[1] : add->src[0], sizeof(float));
        sums[j]     = p.buffer;
        a.sum_at[j] = p.at;
        a.flags |= MATVEC_HAS_SUM_0 << j;
    }
    const uint32_t groups = (a.n_rows + 3) / 4;
    const uint32_t z      = (groups + 32767) / 32768; // of rows, because a dimension has at most 65535
    dispatch(ctx, subctx, matvec_shader, { bits_of(w->type), n_cols },
             { at_w.buffer, rotated, to.buffer, ids_buffer, sums[0], sums[1] }, a,
             { (groups + z - 1) / z, (uint32_t) n_mats, z });
    ctx->prealloc_y_need_sync = true;
    return true;
}

static bool mul_mat(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i) {
    ggml_tensor * node = graph->nodes[i];
    ggml_tensor * w    = node->src[0];
    if (!ggml_is_tbq(w->type)) {
        return false;
    }
    if (mul_mat_vec(ctx, subctx, graph, i)) {
        return true;
    }
    scratch     memory(ctx, subctx, scratch::bytes(w));
    ggml_tensor f16 = memory.tensor(w);
    decode(ctx, subctx, w, &f16);
    ggml_vk_sync_buffers(ctx, subctx);
    // in place, because a sum that the backend computes with it names this node
    node->src[0] = &f16;
    if (node->op == GGML_OP_MUL_MAT) {
        ggml_vk_mul_mat(ctx, subctx, graph, i);
    } else {
        ggml_vk_mul_mat_id(ctx, subctx, graph, i);
    }
    node->src[0]              = w;
    ctx->prealloc_x_need_sync = true;
    return true;
}

// The values are the first channels of the keys (MLA).
static bool values_in_keys(const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    return v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs)) &&
           v->type == k->type && v->nb[1] == k->nb[1] && v->nb[2] == k->nb[2] && v->nb[3] == k->nb[3];
}

// K or V as f16, with its exact rows at their cells, and with the mean that its rows lack.
static ggml_tensor to_f16(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst, int side,
                          scratch & memory) {
    const ggml_tensor * t    = dst->src[side];
    const ggml_tensor * mean = side == 1 || tbq_ggml_flash_attn_ext_center_values(dst) ? dst->src[8] : nullptr;
    ggml_tensor         f16  = memory.tensor(t);
    decode(ctx, subctx, t, &f16, 0, nullptr, mean);
    if (const ggml_tensor * exact = dst->src[side + 4]) {
        ggml_vk_sync_buffers(ctx, subctx);
        decode(ctx, subctx, exact, &f16, WRITES_LISTED, dst->src[7], mean);
    }
    return f16;
}

// --- attention from packed rows --------------------------------------------------------------------------------------

namespace {

// How the shader is specialized for a node, and how the work is split.
struct attention_shape {
    enum { THREADS = 128, TILES = 256 }; // of the shader

    uint32_t blocks_k, blocks_v;
    uint32_t columns, columns4, groups; // of a KV head; of a workgroup, divided by four; groups of so many
    uint32_t rows = 32;                 // of a tile
    bool     exact;

    explicit attention_shape(const ggml_tensor * dst)
        : blocks_k(dst->src[1]->ne[0] / TBQ_BLOCK), blocks_v(dst->src[2]->ne[0] / TBQ_BLOCK),
          columns(dst->src[0]->ne[1] * (dst->src[0]->ne[2] / dst->src[1]->ne[2])), exact(dst->src[7]) {
        set_columns4(columns > 4 ? 2 : 1);
    }

    void set_columns4(uint32_t n) {
        columns4 = n;
        groups   = (columns + 4 * n - 1) / (4 * n);
    }

    // bytes of the shader's shared variables
    size_t shared_memory(const ggml_tensor * dst) const {
        const auto stride = [&](const ggml_tensor * t, uint32_t blocks) {
            const uint32_t words = (uint32_t) ((ggml_row_size(t->type, t->ne[0]) + 3) / 4);
            return (exact && ggml_is_tbq(t->type) ? 17 * blocks : words) | 1;
        };
        const uint32_t column_words = 4 * columns4; // of a vec4 for each group
        return 4 * (2 * 16 + std::max(blocks_k, blocks_v) * 64 * column_words +
                    rows * (stride(dst->src[1], blocks_k) + stride(dst->src[2], blocks_v) + blocks_v) +
                    rows * 4 * column_words + column_words * (rows + 4) + rows * column_words + 3 * column_words +
                    rows + TILES + 1);
    }

    // Larger tiles where there is memory for several workgroups at a time.
    void choose(const ggml_tensor * dst, size_t available) {
        rows = 64;
        if (shared_memory(dst) > std::min<size_t>(available * 3 / 4, 36 << 10)) {
            rows = 32;
        }
        if (shared_memory(dst) > available) {
            set_columns4(1);
        }
    }
};

} // namespace

// More columns than this are a prompt: converting the cache once takes less work than unpacking it for every eight.
#define TBQ_VK_MAX_COLUMNS 32

// Sums of each column of one range of the cache: values, the maximum and the sum of weights.
static uint64_t partial_bytes(const ggml_tensor * dst) {
    return (uint64_t) ggml_nrows(dst) * (dst->src[2]->ne[0] + 2) * sizeof(float);
}

// Whether the shader can compute a node that the backend supports.
static bool packed_supported(const vk_device & device, const ggml_tensor * dst, attention_shape & shape) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    if (q->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 || (dst->src[4] && dst->src[4]->type != GGML_TYPE_F32)) {
        return false;
    }
    const auto readable = [](const ggml_tensor * t) {
        return (ggml_is_tbq(t->type) || t->type == GGML_TYPE_Q8_0 || t->type == GGML_TYPE_F16) &&
               t->ne[0] % TBQ_BLOCK == 0 && has_rows(t);
    };
    if (!readable(k) || !readable(v) || v->ne[0] > 64 * attention_shape::THREADS / 8 || q->nb[0] != sizeof(float) ||
        !ggml_is_contiguous(dst) || q->ne[2] % k->ne[2] != 0 || q->ne[2] > 65535 || k->ne[2] != v->ne[2] ||
        k->ne[3] != v->ne[3] || q->ne[3] % k->ne[3] != 0 || q->ne[3] > 65535 ||
        (mask && (mask->ne[2] != 1 || mask->type != GGML_TYPE_F16))) {
        return false;
    }
    for (int side = 1; side <= 2; side++) { // the slots of heads follow each other
        const ggml_tensor * e = dst->src[side + 4];
        if (e && e->nb[2] != e->ne[0] / TBQ_BLOCK * sizeof(block_tbq8_0)) {
            return false;
        }
    }
    // results of the ranges of a cache, of which there may be one
    if (k->ne[1] == 0 || partial_bytes(dst) > device->properties.limits.maxStorageBufferRange) {
        return false;
    }
    shape.choose(dst, device->properties.limits.maxComputeSharedMemorySize);
    return shape.groups * k->ne[2] <= 65535 &&
           shape.shared_memory(dst) <= device->properties.limits.maxComputeSharedMemorySize;
}

// As the shader names it.
static uint32_t stored_type(ggml_type type) {
    return type == GGML_TYPE_F16 ? 16 : type == GGML_TYPE_Q8_0 ? 9 : bits_of(type);
}

// Two places in a word.
static uint32_t pack_places(uint32_t a, uint32_t b) {
    return a | b << 16;
}

static bool attention_packed(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    const ggml_tensor * cells = dst->src[7];
    const ggml_tensor * mean  = dst->src[8];

    attention_shape shape(dst);
    if (!packed_supported(ctx->device, dst, shape)) {
        return false;
    }
    const auto  optional = [&](const ggml_tensor * t, size_t unit) { return place(ctx, t ? t : q, unit); };
    const place at_q(ctx, q, sizeof(float)), at_k(ctx, k, 2), at_v(ctx, v, 2),
        at_mask = optional(mask, 2), at_exact_k = optional(dst->src[5], 4), at_exact_v = optional(dst->src[6], 4),
        at_cells = optional(cells, sizeof(int32_t)), at_mean = optional(mean, sizeof(float)),
        to(ctx, dst, sizeof(float)), at_sinks                = optional(sinks, sizeof(float));
    for (const place * p :
         { &at_q, &at_k, &at_v, &at_mask, &at_exact_k, &at_exact_v, &at_cells, &at_mean, &to, &at_sinks }) {
        if (p->at > 0xFFFF) {
            return false;
        }
    }

    attention_args a = {};
    fill_strides(a.q_s, q, sizeof(float));
    fill_strides(a.k_s, k, 2);
    fill_strides(a.v_s, v, 2);
    a.mask_ne3 = 1;
    if (mask) {
        a.mask_s1  = (uint32_t) (mask->nb[1] / sizeof(ggml_fp16_t));
        a.mask_s3  = (uint32_t) (mask->nb[3] / sizeof(ggml_fp16_t));
        a.mask_ne3 = (uint32_t) mask->ne[3];
        a.flags |= HAS_MASK;
    }
    a.n_kv = (uint32_t) k->ne[1];
    if (cells) {
        if (const ggml_tensor * e = dst->src[5]) {
            a.exact_k_s1 = (uint32_t) (e->nb[1] / 4);
            a.exact_k_s3 = (uint32_t) (e->nb[3] / 4);
        }
        if (const ggml_tensor * e = dst->src[6]) {
            a.exact_v_s1 = (uint32_t) (e->nb[1] / 4);
            a.exact_v_s3 = (uint32_t) (e->nb[3] / 4);
        }
        a.cells_s1 = (uint32_t) cells->ne[0];
        a.n_exact  = a.cells_s1 - (a.n_kv + 31) / 32;
    }
    if (mean) {
        a.flags |= LOGITS_LACK_MEAN;
    }
    a.at_q_mask       = pack_places(at_q.at, mask ? at_mask.at : 0);
    a.at_k_v          = pack_places(at_k.at, at_v.at);
    a.at_exact        = pack_places(at_exact_k.at, at_exact_v.at);
    a.at_cells_mean   = pack_places(at_cells.at, at_mean.at);
    a.at_result_sinks = pack_places(to.at, at_sinks.at);
    a.flags |= (sinks ? ATTENTION_HAS_SINKS : 0) |
               (tbq_ggml_flash_attn_ext_center_values(dst) ? ATTENTION_VALUES_LACK_MEAN : 0);
    a.n_q      = (uint32_t) q->ne[1];
    a.heads    = (uint32_t) (q->ne[2] | k->ne[2] << 16);
    a.n_seq_kv = (uint32_t) k->ne[3];
    memcpy(&a.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a.softcap, (const float *) dst->op_params + 2, sizeof(float));
    if (a.softcap != 0.0f) {
        a.scale /= a.softcap;
    }

    // Four workgroups for each core of the device, as far as there are rows for them. A small cache is one split, which
    // needs no merging.
    const uint32_t cores = ctx->device->shader_core_count ? ctx->device->shader_core_count : 16;
    const uint32_t heads = shape.groups * (uint32_t) (k->ne[2] * q->ne[3]);
    const uint64_t fit   = ctx->device->properties.limits.maxStorageBufferRange / partial_bytes(dst);
    const uint32_t most =
        (uint32_t) std::min<uint64_t>({ a.n_kv <= 256 ? 1 : (a.n_kv + 127) / 128, fit, 256 }); // 256: merge's
    uint32_t n       = std::min(std::max(4 * cores / heads, 1u), most);
    a.rows_per_split = GGML_PAD((a.n_kv + n - 1) / n, shape.rows);
    n                = (a.n_kv + a.rows_per_split - 1) / a.rows_per_split;

    const uint64_t n_columns = (uint64_t) ggml_nrows(dst);
    const size_t   size      = n > 1 ? n * partial_bytes(dst) : 0;
    if (ctx->prealloc_size_split_k < size) {
        ctx->prealloc_size_split_k = size;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }
    if (n > 1 && ctx->prealloc_split_k_need_sync) {
        ggml_vk_sync_buffers(ctx, subctx);
    }
    const vk_subbuffer partial = n > 1 ? vk_subbuffer{ ctx->prealloc_split_k, 0, size } : to.buffer;
    const auto aligned = [](const place & p, const uint32_t (&s)[3]) { return ((p.at | s[0] | s[1] | s[2]) & 1) == 0; };
    dispatch(ctx, subctx, attention_shader,
             { stored_type(k->type), stored_type(v->type), shape.blocks_k, shape.blocks_v, shape.columns4, shape.exact,
               shape.rows, aligned(at_k, a.k_s), aligned(at_v, a.v_s) },
             { at_q.buffer, at_k.buffer, at_v.buffer, at_mask.buffer, partial, at_exact_k.buffer, at_exact_v.buffer,
               at_cells.buffer, at_mean.buffer, to.buffer, at_sinks.buffer },
             a, { n, shape.groups * (uint32_t) k->ne[2], (uint32_t) q->ne[3] });
    if (n == 1) {
        return true;
    }
    ggml_vk_sync_buffers(ctx, subctx);

    merge_args m = {};
    m.n_columns  = (uint32_t) n_columns;
    m.n_splits   = n;
    m.blocks     = shape.blocks_v;
    m.n_head     = (uint32_t) q->ne[2];
    m.gqa        = (uint32_t) (q->ne[2] / k->ne[2]);
    m.result_at  = to.at;
    m.sinks_at   = at_sinks.at;
    m.mean_at    = at_mean.at;
    m.mean_s     = (uint32_t) k->ne[0];
    m.flags      = (sinks ? HAS_SINKS : 0) | (tbq_ggml_flash_attn_ext_center_values(dst) ? VALUES_LACK_MEAN : 0);
    dispatch(ctx, subctx, merge_shader, { ggml_is_tbq(v->type) },
             { partial, to.buffer, at_sinks.buffer, at_mean.buffer }, m, in_two_dimensions(n_columns * shape.blocks_v));
    ctx->prealloc_split_k_need_sync = true;
    return true;
}

// Whether K and V as f16 are not too large for the device, and the backend has a kernel for them.
static bool conversion_fits(const vk_device & device, const ggml_tensor * dst) {
    size_t all = 0;
    for (int side = 1; side <= 2; side++) {
        if (ggml_is_tbq(dst->src[side]->type)) {
            const size_t size = scratch::bytes(dst->src[side]);
            if (size > device->properties.limits.maxStorageBufferRange) {
                return false;
            }
            all += size;
        }
    }
    return all <= device->max_buffer_size && (device->coopmat2 || (device->subgroup_shuffle && device->subgroup_vote));
}

// --- all of attention ------------------------------------------------------------------------------------------------

// A few columns are computed from packed rows. Otherwise K and V are converted to f16 for the backend's own kernel.
static bool flash_attn_ext(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst) {
    const ggml_tensor * k     = dst->src[1];
    const ggml_tensor * v     = dst->src[2];
    const bool          tbq_k = ggml_is_tbq(k->type), tbq_v = ggml_is_tbq(v->type);
    if (!tbq_k && !tbq_v) {
        return false;
    }
    if ((attention_shape(dst).columns <= TBQ_VK_MAX_COLUMNS || !conversion_fits(ctx->device, dst)) &&
        attention_packed(ctx, subctx, dst)) {
        return true;
    }
    GGML_ASSERT(conversion_fits(ctx->device, dst));
    // The backend's attention has a use of the same memory, for quantized types and on Intel's Xe, but not for f16 rows
    // that follow each other.
    const bool  v_in_k = values_in_keys(dst);
    scratch     memory(ctx, subctx, (tbq_k ? scratch::bytes(k) : 0) + (tbq_v && !v_in_k ? scratch::bytes(v) : 0));
    ggml_tensor k_f16, v_f16;
    if (tbq_k) {
        k_f16 = to_f16(ctx, subctx, dst, 1, memory);
        k     = &k_f16;
    }
    if (v_in_k) {
        v_f16       = k_f16;
        v_f16.ne[0] = v->ne[0];
        v           = &v_f16;
    } else if (tbq_v) {
        v_f16 = to_f16(ctx, subctx, dst, 2, memory);
        v     = &v_f16;
    }
    ggml_vk_sync_buffers(ctx, subctx);
    ggml_vk_flash_attn(ctx, subctx, dst->src[0], k, v, dst->src[3], dst->src[4], dst);
    ctx->prealloc_x_need_sync = true;
    return true;
}

// --- what the backend asks for, and what it promises -----------------------------------------------------------------

bool tbq_vk_compute(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i) {
    ggml_tensor * dst = graph->nodes[i];
    switch (dst->op) {
        case GGML_OP_ROPE:
        case GGML_OP_SET_ROWS: return set_rows(ctx, subctx, graph, i);
        case GGML_OP_CONCAT: return concat(ctx, subctx, dst);
        case GGML_OP_CPY: return cpy(ctx, subctx, dst);
        case GGML_OP_GET_ROWS: return get_rows(ctx, subctx, dst);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return mul_mat(ctx, subctx, graph, i);
        case GGML_OP_FLASH_ATTN_EXT: return flash_attn_ext(ctx, subctx, dst);
        default: return false;
    }
}

// The backend's own kernel can do it with f16.
static bool mul_mat_supported(ggml_backend_dev_t dev, const ggml_tensor * op) {
    const ggml_tensor * w = op->src[0];
    if (!ggml_is_tbq(w->type) || !has_rows(w) || op->src[1]->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32) {
        return false;
    }
    ggml_tensor f16 = as_f16(w), converted = *op;
    converted.src[0] = &f16;
    return ggml_backend_dev_supports_op(dev, &converted);
}

static bool flash_attn_ext_supported(ggml_backend_dev_t dev, const vk_device & device, const ggml_tensor * op) {
    if (!ggml_is_tbq(op->src[1]->type) && !ggml_is_tbq(op->src[2]->type)) {
        return false;
    }
    if (!tbq_ggml_flash_attn_ext_valid(op) || (op->src[5] && !has_rows(op->src[5])) ||
        (op->src[6] && !has_rows(op->src[6]))) {
        return false;
    }
    attention_shape shape(op);
    if (packed_supported(device, op, shape)) {
        return true;
    }
    ggml_tensor f16[2], converted = *op;
    for (int side = 1; side <= 2; side++) {
        const ggml_tensor * t = op->src[side];
        if (ggml_is_tbq(t->type)) {
            if (!has_rows(t)) {
                return false;
            }
            f16[side - 1]       = as_f16(t);
            converted.src[side] = &f16[side - 1];
        }
    }
    converted.src[5] = converted.src[6] = converted.src[7] = converted.src[8] = nullptr;
    return conversion_fits(device, op) && ggml_backend_dev_supports_op(dev, &converted);
}

static bool set_rows_supported(const ggml_tensor * op) {
    const ggml_tensor * src   = op->src[0];
    const ggml_tensor * ids   = op->src[1];
    const ggml_tensor * exact = op->src[5];
    const ggml_tensor * slots = op->src[6];
    if (!ggml_is_tbq(op->type) || !has_rows(op) || !has_rows(src) ||
        (src->type != GGML_TYPE_F32 && src->type != GGML_TYPE_F16) ||
        (ids->type != GGML_TYPE_I32 && ids->type != GGML_TYPE_I64) || !exact != !slots) {
        return false;
    }
    return !exact || (exact->type == GGML_TYPE_TBQ8_0 && exact->ne[0] == src->ne[0] && has_rows(exact) &&
                      slots->type == GGML_TYPE_I32 && ggml_is_contiguous(slots) && op->op_params[0] >= 0 &&
                      op->op_params[0] + ggml_nrows(src) <= ggml_nelements(slots));
}

// Four values are written at once.
static bool is_aligned(const ggml_tensor * t) {
    return (t->nb[1] | t->nb[2] | t->nb[3] | t->view_offs) % (4 * sizeof(float)) == 0;
}

bool tbq_vk_supports_op(ggml_backend_dev_t dev, const vk_device & device, const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
        case GGML_OP_SET_ROWS: return set_rows_supported(op);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return mul_mat_supported(dev, op);
        case GGML_OP_FLASH_ATTN_EXT: return flash_attn_ext_supported(dev, device, op);
        case GGML_OP_GET_ROWS:
            return is_cached(a->type) && has_rows(a) && b->type == GGML_TYPE_I32 && op->type == GGML_TYPE_F32 &&
                   is_aligned(op);
        case GGML_OP_CONCAT:
            return op->type == GGML_TYPE_TBQ8_0 && op->op_params[0] == 1 && a->type == GGML_TYPE_TBQ8_0 &&
                   b->type == GGML_TYPE_F32 && a->ne[0] == b->ne[0] && has_rows(op) && has_rows(a) && has_rows(b) &&
                   ggml_is_contiguous_rows(a) && a->nb[1] == op->nb[1] && op->ne[3] == 1;
        case GGML_OP_CPY: // b is where it goes
            return ((is_cached(a->type) && b->type == GGML_TYPE_F32 && is_aligned(b)) ||
                    ((a->type == GGML_TYPE_F32 || a->type == GGML_TYPE_F16) && is_cached(b->type))) &&
                   ggml_are_same_shape(a, b) && has_rows(a) && has_rows(b);
        default: return false;
    }
}
