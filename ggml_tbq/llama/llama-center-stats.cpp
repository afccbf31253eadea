// SPDX-License-Identifier: MIT
// Measuring the means of keys (llama-center.h).

#include "llama-center.h"
#include "llama-center-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include "hash/hash.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

struct llama_cache_center_stats {
    struct layer {
        std::vector<double> sum;        // [n_head_kv][n_embd_head]
        double              energy = 0; // sum of squares
        uint64_t            n      = 0; // keys
        std::vector<double> query;      // [n_head_kv][n_embd_head], sums of squares
        uint64_t            n_query = 0;
    };
    std::map<int32_t, layer> layers;

    std::map<const ggml_tensor *, int32_t> caches; // which layer's keys a tensor holds
};

llama_cache_center_stats * llama_cache_center_stats_init(const llama_context * ctx) {
    std::vector<llama_kv_cache *> caches;
    try {
        caches = llama_center_caches(*ctx);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: nothing to measure: %s\n", __func__, err.what());
        return nullptr;
    }
    auto res = std::make_unique<llama_cache_center_stats>();
    for (const llama_kv_cache * kv : caches) {
        if (kv->get_layer_ids().empty()) {
            continue;
        }
        if (kv->type_k() != GGML_TYPE_F32 && kv->type_k() != GGML_TYPE_F16) {
            LLAMA_LOG_ERROR("%s: keys of type %s cannot be measured, f32 or f16 can\n", __func__,
                            ggml_type_name(kv->type_k()));
            return nullptr;
        }
        for (const uint32_t il : kv->get_layer_ids()) {
            res->layers[il].sum.resize(ctx->get_model().hparams.n_embd_k_gqa(il));
            res->layers[il].query.resize(ctx->get_model().hparams.n_embd_k_gqa(il));
            res->caches[kv->get_k_storage(il)] = il;
        }
    }
    if (res->layers.empty()) {
        LLAMA_LOG_ERROR("%s: nothing to measure, the keys of this model stay as they are: it has no layer with keys\n",
                        __func__);
        return nullptr;
    }
    return res.release();
}

void llama_cache_center_stats_free(llama_cache_center_stats * stats) {
    delete stats;
}

// The attention of whatever architecture is FLASH_ATTN_EXT(q, k, ...) or MUL_MAT(k, q), with a view of the cache for k.
bool llama_cache_center_stats_eval(ggml_tensor * t, bool ask, void * user_data) {
    auto * stats = *(llama_cache_center_stats **) user_data;
    if (!stats || (t->op != GGML_OP_FLASH_ATTN_EXT && t->op != GGML_OP_MUL_MAT)) {
        return false;
    }
    const ggml_tensor * q = t->op == GGML_OP_MUL_MAT ? t->src[1] : t->src[0];
    const ggml_tensor * k = t->op == GGML_OP_MUL_MAT ? t->src[0] : t->src[1];
    // through views, and the cast of f32 keys
    while (k->src[0] && stats->caches.find(k->view_src) == stats->caches.end() &&
           (k->op == GGML_OP_CPY || k->op == GGML_OP_CONT || k->op == GGML_OP_VIEW || k->op == GGML_OP_PERMUTE ||
            k->op == GGML_OP_RESHAPE)) {
        k = k->src[0];
    }
    const auto cache = stats->caches.find(k->view_src);
    // transposed: latent vectors as values, and what they are multiplied with are no queries
    if (cache == stats->caches.end() || k->op == GGML_OP_TRANSPOSE || q->type != GGML_TYPE_F32) {
        return false;
    }
    if (ask) {
        return true;
    }
    // q: [n_embd_head, n_tokens, n_head], a view in any order
    llama_cache_center_stats::layer & layer       = stats->layers[cache->second];
    const int64_t                     n_embd_head = q->ne[0];
    const int64_t                     n_head_kv   = layer.query.size() / n_embd_head;
    std::vector<uint8_t>              raw(ggml_nbytes(q));
    ggml_backend_tensor_get(q, raw.data(), 0, raw.size());
    for (int64_t h = 0; h < q->ne[2]; ++h) {
        double * sum = layer.query.data() + h / (q->ne[2] / n_head_kv) * n_embd_head;
        for (int64_t i = 0; i < q->ne[1]; ++i) {
            const float * row = (const float *) (raw.data() + h * q->nb[2] + i * q->nb[1]);
            for (int64_t c = 0; c < n_embd_head; ++c) {
                sum[c] += (double) row[c] * row[c];
            }
        }
    }
    layer.n_query += q->ne[1] * (q->ne[2] / n_head_kv);
    return true;
}

int32_t llama_cache_center_stats_add(llama_cache_center_stats * stats, llama_context * ctx, llama_pos pos) {
    ctx->synchronize();
    int32_t res = 0;
    for (llama_kv_cache * kv : llama_center_caches(*ctx)) {
        const llama_kv_cells & cells = kv->get_cells(0);
        for (const uint32_t il : kv->get_layer_ids()) {
            const auto it = stats->layers.find(il);
            if (it == stats->layers.end()) {
                continue;
            }
            const ggml_tensor *  k      = kv->get_k_storage(il);
            const size_t         n_embd = it->second.sum.size();
            std::vector<uint8_t> raw(ggml_row_size(k->type, n_embd));
            std::vector<float>   row(n_embd);
            int32_t              n = 0;
            for (uint32_t i = 0; i < cells.size(); ++i) {
                if (cells.is_empty(i) || !cells.seq_has(i, 0) || cells.pos_get(i) < pos) {
                    continue;
                }
                ggml_backend_tensor_get(k, raw.data(), i * k->nb[1], raw.size());
                if (k->type == GGML_TYPE_F16) {
                    ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), row.data(), n_embd);
                } else {
                    memcpy(row.data(), raw.data(), raw.size());
                }
                for (size_t j = 0; j < n_embd; ++j) {
                    it->second.sum[j] += row[j];
                    it->second.energy += (double) row[j] * row[j];
                }
                n++;
            }
            it->second.n += n;
            res = std::max(res, n);
        }
    }
    return res;
}

float llama_cache_center_stats_share(const llama_cache_center_stats * stats, int32_t il) {
    const auto it = stats->layers.find(il);
    if (it == stats->layers.end() || it->second.energy == 0) {
        return -1.0f;
    }
    double square = 0;
    for (const double sum : it->second.sum) {
        square += sum * sum;
    }
    return (float) (square / it->second.n / it->second.energy);
}

static bool has_long_rope(const llama_model & model) {
    return std::any_of(model.layers.begin(), model.layers.end(), [](const llama_layer & l) { return l.rope_long; });
}

uint32_t llama_cache_center_n_cells(const llama_model * model, uint32_t n_ctx, uint32_t n_chunk) {
    return has_long_rope(*model) && n_ctx > model->hparams.n_ctx_orig_yarn ? model->hparams.n_ctx_orig_yarn + n_chunk
                                                                           : n_chunk;
}

llama_center * llama_cache_center_stats_get(const llama_cache_center_stats * stats, const llama_context * ctx,
                                            uint32_t n_ctx) {
    const llama_model & model  = ctx->get_model();
    auto                center = std::make_unique<llama_center>();
    center->path               = "the measured center";
    center->arch               = llm_arch_name(model.arch);
    center->n_ctx              = n_ctx;
    for (const auto & [il, l] : stats->layers) {
        if (l.n == 0 || l.n_query == 0) {
            LLAMA_LOG_ERROR("%s: layer %d saw no %s\n", __func__, il, l.n ? "query" : "key");
            return nullptr;
        }
        std::vector<float> mean(l.sum.size());
        std::vector<float> energy(l.query.size());
        std::transform(l.sum.begin(), l.sum.end(), mean.begin(), [&](double sum) { return (float) (sum / l.n); });
        std::transform(l.query.begin(), l.query.end(), energy.begin(),
                       [&](double sum) { return (float) (sum / l.n_query); });
        center->n_tokens   = std::max(center->n_tokens, l.n);
        center->layers[il] = { model.hparams.n_embd_head_k(il),
                               model.hparams.n_head_kv(il),
                               std::move(mean),
                               std::move(energy),
                               llama_center_rope(*ctx, il),
                               llama_center_rope_factors(*ctx, il),
                               llama_cache_center_stats_share(stats, il) };
    }
    try {
        center->fingerprint = llama_center_identity(*ctx);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return nullptr;
    }
    return center.release();
}

int32_t llama_center_save(const llama_center * center, const char * path) {
    // the old file stays until the new one has been read back
    try {
        llama_file_replace out(path);
        center->save(out.path());
        llama_center::load(out.path());
        out.commit();
        return 0;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s: %s\n", __func__, path, err.what());
        return -1;
    }
}

int32_t llama_cache_center_stats_save(const llama_cache_center_stats * stats, const llama_context * ctx, uint32_t n_ctx,
                                      const char * path) {
    const std::unique_ptr<llama_center> center(llama_cache_center_stats_get(stats, ctx, n_ctx));
    return center ? llama_center_save(center.get(), path) : -1;
}

// --- one center for many contexts -----------------------------------------------------------------------------------

// A change of the measurement, or of its text, increases it: centers that were kept are then not used any more.  Python
// has the same number (calibrate.py).
static constexpr uint32_t LLAMA_CENTER_METHOD = 3;

// tokens that RoPE is set up for
static uint64_t rope_context(const llama_context & ctx) {
    const llama_cparams & cparams = ctx.get_cparams();
    const llama_hparams & hparams = ctx.get_model().hparams;
    uint64_t res = hparams.n_ctx_train; // with YaRN: of the scaled RoPE, llama_init_from_model() sees to that
    if (cparams.rope_scaling_type == LLAMA_ROPE_SCALING_TYPE_LINEAR) {
        res = std::max(res, (uint64_t) (res * hparams.rope_freq_scale_train / cparams.rope_freq_scale));
    }
    // short factors up to here, long ones from here on
    if (has_long_rope(ctx.get_model()) && cparams.n_ctx_seq <= hparams.n_ctx_orig_yarn) {
        res = std::min<uint64_t>(res, hparams.n_ctx_orig_yarn);
    }
    return res;
}

uint32_t llama_cache_center_n_ctx(const llama_context * ctx) {
    uint64_t res = 8192;
    while (res < ctx->n_ctx_seq()) {
        res *= 4;
    }
    const uint64_t longest = rope_context(*ctx);
    return longest > 0 ? std::min(res, longest) : res;
}

// Throws if no layer can be centered.
static std::string center_key(const llama_context & ctx, bool own_rope) {
    const llama_model & model  = ctx.get_model();
    std::string         reason = "it has no layer with keys";
    std::string         rope;
    const bool          mtp = ctx.get_cparams().ctx_type == LLAMA_CONTEXT_TYPE_MTP; // other layers of the same model
    if (llama_model_has_encoder(&model)) {
        throw std::runtime_error("a model with an encoder");
    }
    for (const llama_kv_cache * kv : llama_center_caches(ctx)) {
        if (kv->is_shared()) {
            throw std::runtime_error("this context reads the cache of another one");
        }
        for (const uint32_t il : kv->get_layer_ids()) {
            if (const char * why = llama_center_why_not(model, il, kv->type_k())) {
                reason = format("with %s, keys of a tbq type can be centered, %s keys cannot", why,
                                ggml_type_name(kv->type_k()));
                continue;
            }
            const std::vector<float> values = llama_center_rope(ctx, il);
            rope += format(" %u %s ", il, llama_center_rope_factors(ctx, il).c_str());
            rope.append((const char *) values.data(), values.size() * sizeof(float));
        }
    }
    if (rope.empty()) {
        throw std::runtime_error(reason);
    }
    const std::string text =
        format("%u %s %u", LLAMA_CENTER_METHOD, llama_center_identity(ctx).c_str(), llama_cache_center_n_ctx(&ctx)) +
        (mtp ? " mtp" : "") + (own_rope ? "" : rope);
    return hash_sha256_hex(text.data(), text.size()).substr(0, 32);
}

int32_t llama_cache_center_key(const llama_context * ctx, bool own_rope, char * buf, size_t n) {
    try {
        snprintf(buf, n, "%s", center_key(*ctx, own_rope).c_str());
        return 0;
    } catch (const std::exception & err) {
        snprintf(buf, n, "%s", err.what());
        return -1;
    }
}
