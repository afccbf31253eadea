// SPDX-License-Identifier: MIT
// Centered keys, as a mechanism of the KV cache.  Why attention gives the same result: docs/design/centering.md.

#include "llama-center-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "tbq-ggml.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <memory>
#include <stdexcept>

// --- which keys -----------------------------------------------------------------------------------------------------

std::vector<float> llama_center_rope(const llama_context & ctx, int32_t il) {
    const llama_cparams & cparams = ctx.get_cparams();
    const llama_model &   model   = ctx.get_model();
    return { model.get_rope_freq_base(cparams, il),
             model.get_rope_freq_scale(cparams, il),
             cparams.yarn_ext_factor,
             cparams.yarn_attn_factor,
             cparams.yarn_beta_fast,
             cparams.yarn_beta_slow,
             (float) cparams.n_ctx_orig_yarn };
}

std::string llama_center_rope_factors(const llama_context & ctx, int32_t il) {
    const ggml_tensor * t = ctx.get_model().get_rope_factors(ctx.get_cparams(), il);
    return t ? ggml_get_name(t) : "none";
}

// A sink and a soft-cap do not move with the logits of a query, so a constant in all of the logits does not cancel.
// The latent vectors of MLA are values as well.
const char * llama_center_needs_mean(const llama_model & model, int32_t il) {
    if (model.layers[il].attn_sinks) {
        return "attention sinks";
    }
    if (model.hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return "a soft-cap of the attention logits";
    }
    if (model.hparams.is_mla()) {
        return "latent attention (MLA)";
    }
    return nullptr;
}

const char * llama_center_why_not(const llama_model & model, int32_t il, ggml_type type_k) {
    return ggml_is_tbq(type_k) ? nullptr : llama_center_needs_mean(model, il);
}

// Other caches are not centered: the keys of an indexer, whose scores see no softmax; recurrent states; caches whose rows
// a graph reads in a way of its own.
std::vector<llama_kv_cache *> llama_center_caches(const llama_context & ctx) {
    const llama_model & model  = ctx.get_model();
    llama_memory_i *    memory = ctx.get_memory();

    if (model.arch == LLM_ARCH_EAGLE3 || model.arch == LLM_ARCH_DFLASH) {
        throw std::runtime_error("the model reads hidden states of another one, so it cannot be measured by itself");
    }
    // These gather rows, or read keys as values, in graphs of their own.
    if (model.arch != LLM_ARCH_GLM5_NEXT && model.arch != LLM_ARCH_DEEPSEEK4) {
        if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
            return { kv };
        }
        if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
            return { iswa->get_base(), iswa->get_swa() };
        }
        if (auto * dsa = dynamic_cast<llama_kv_cache_dsa *>(memory)) {
            return { dsa->get_mla() };
        }
        if (auto * dsa = dynamic_cast<llama_kv_cache_dsa_iswa *>(memory)) {
            return { dsa->get_dsa()->get_mla(), dsa->get_swa() };
        }
        if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
            return { hybrid->get_mem_attn() };
        }
        if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
            return { hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa() };
        }
    }
    throw std::runtime_error(
        format("the memory of a %s model has no keys that can be centered", llm_arch_name(model.arch)));
}

// --- in the cache ---------------------------------------------------------------------------------------------------

// Rotate heads as the graph does before it stores keys (build_input_k_rot): a rotation is linear, so the mean of
// rotated keys is the rotated mean.
static std::vector<float> rotated(const std::vector<float> & x, const std::vector<float> & rot, int64_t n_rot) {
    std::vector<float> res(x.size());
    for (size_t i = 0; i < x.size(); i += n_rot) {
        for (int64_t r = 0; r < n_rot; ++r) {
            double sum = 0.0;
            for (int64_t c = 0; c < n_rot; ++c) {
                sum += (double) rot[r * n_rot + c] * x[i + c];
            }
            res[i + r] = (float) sum;
        }
    }
    return res;
}

// What error costs in each channel of a block: the queries' energy there, pooled over pairs of channels as the encoder
// wants it, to a power that trusts the sample a little less, and a floor.  docs/design/centering.md has what was tried.
static std::vector<float> weights_of(const std::vector<float> & energy) {
    constexpr size_t   n_block = TBQ_BLOCK;
    std::vector<float> res(energy.size());
    for (size_t b = 0; b + n_block <= energy.size(); b += n_block) {
        double sum = 0.0;
        for (size_t i = b; i < b + n_block; i += 2) {
            res[i] = res[i + 1] = std::pow(0.5f * (energy[i] + energy[i + 1]), 0.75f);
            sum += 2.0 * res[i];
        }
        for (size_t i = b; i < b + n_block; ++i) {
            res[i] = sum > 0.0 ? (float) (res[i] / (sum / n_block)) + 0.1f : 1.0f;
        }
    }
    return res;
}

// A tensor of these values in a buffer of its own, which bufs keeps.  heads: also as [n_embd_head, n_head] of it.
static ggml_tensor * upload(llama_kv_center & center, ggml_backend_buffer_type_t buft, const char * name,
                            const std::vector<float> & values, bool no_alloc, int64_t n_embd_head = 0,
                            ggml_tensor ** heads = nullptr) {
    ggml_init_params params = { /*.mem_size =*/2 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr,
                                /*.no_alloc =*/true };
    ggml_context_ptr ctx{ ggml_init(params) };
    ggml_tensor *    t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, values.size());
    ggml_set_name(t, name);
    if (heads) {
        *heads = ggml_reshape_2d(ctx.get(), t, n_embd_head, t->ne[0] / n_embd_head);
    }
    ggml_backend_buffer_ptr buf{ no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0)
                                          : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
    if (!buf) {
        throw std::runtime_error("failed to allocate the means of the keys");
    }
    if (no_alloc) {
        t->buffer = buf.get();
        if (heads) {
            (*heads)->buffer = buf.get();
        }
    } else {
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
    center.bufs.emplace_back(std::move(ctx), std::move(buf));
    return t;
}

const std::string llama_kv_center::ROTATED(64, '0');

// With heads of two blocks it makes hardly a difference: docs/measurements/centering.md.
bool llama_kv_center_rotates(const llama_hparams & hparams) {
    // A K-shift views only the channels of a head that RoPE rotates, and would need all of them.
    return hparams.rope_type == LLAMA_ROPE_TYPE_NEOX && hparams.n_embd_head_k() >= 4 * TBQ_BLOCK &&
           hparams.n_rot() == hparams.n_embd_head_k();
}

void llama_kv_cache::set_center(const llama_center * means, const std::string & hash) {
    if (means && other) {
        throw std::runtime_error("this context reads the cache of another one");
    }
    for (auto & layer : layers) {
        layer.center = {};
    }
    center = {};
    if (!other && !layers.empty() && ggml_is_tbq(type_k())) {
        attn_rot_k  = !means && !attn_rot_hadamard.empty() && llama_kv_center_rotates(hparams);
        center.hash = attn_rot_k ? llama_kv_center::ROTATED : "";
        for (auto & layer : layers) {
            if (attn_rot_k && layer.k->ne[0] > 0) { // no channel of a rotated key costs more than another
                layer.center.weight = upload(center, ggml_backend_buffer_get_type(layer.k->buffer), layer.k->name,
                                             std::vector<float>(layer.k->ne[0], 1.0f), hparams.no_alloc);
            }
        }
    }
    if (!means) {
        return;
    }

    int64_t n_rot = 64; // as in build_input_k_rot
    while (attn_rot_k && n_embd_head_k_all % (2 * n_rot) == 0) {
        n_rot *= 2;
    }
    for (auto & layer : layers) {
        const auto it = means->layers.find(layer.il);
        if (it == means->layers.end() || llama_center_why_not(model, layer.il, layer.k->type)) {
            continue;
        }
        // where they are used: for a tbq type next to the cache, in SET_ROWS; for others where the keys are computed
        const bool                 tbq  = ggml_is_tbq(layer.k->type);
        ggml_backend_buffer_type_t buft = tbq ? ggml_backend_buffer_get_type(layer.k->buffer)
                                              : ggml_backend_dev_buffer_type(model.dev_layer(layer.il));
        // named like the keys: with a split of tensors over devices the name decides who holds which heads
        const bool whole         = llama_center_needs_mean(model, layer.il);
        layer.center.n_embd_head = hparams.n_embd_head_k(layer.il);
        layer.center.n_embd_nope = hparams.n_lora_kv > 0 ? layer.center.n_embd_head - hparams.n_rot(layer.il) : 0;
        layer.center.mean =
            upload(center, buft, layer.k->name,
                   attn_rot_k ? rotated(it->second.mean, attn_rot_hadamard.at(n_rot), n_rot) : it->second.mean,
                   hparams.no_alloc, layer.center.n_embd_head, whole ? &layer.center.heads : nullptr);
        if (tbq) {
            layer.center.weight = upload(center, buft, layer.k->name, weights_of(it->second.energy), hparams.no_alloc);
        }
        center.hash = hash; // not where no layer is centered
    }
}

// the means in the shape of k: whole rows, heads, or the channels of each head that RoPE turns
static ggml_tensor * mean_like(ggml_context * ctx, const llama_kv_center_layer & layer, const ggml_tensor * k) {
    if (k->ne[0] == layer.mean->ne[0]) {
        return layer.mean;
    }
    const int64_t first = k->ne[0] < layer.n_embd_head ? layer.n_embd_nope : 0;
    return ggml_view_2d(ctx, layer.mean, k->ne[0], k->ne[1], layer.n_embd_head * sizeof(float), first * sizeof(float));
}

ggml_tensor * llama_kv_center_layer::add(ggml_context * ctx, ggml_tensor * k) const {
    return mean ? ggml_add(ctx, k, mean_like(ctx, *this, k)) : k;
}

ggml_tensor * llama_kv_center_layer::subtract(ggml_context * ctx, ggml_tensor * k) const {
    return mean ? ggml_sub(ctx, k, mean_like(ctx, *this, k)) : k;
}

// SET_ROWS of a tbq type subtracts the mean itself and weighs error by channel; for other types a SUB goes before it.
ggml_tensor * llama_kv_center_layer::set_rows(ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_cur,
                                              ggml_tensor * k_idxs) const {
    if (!ggml_is_tbq(k->type)) {
        return ggml_set_rows(ctx, k, subtract(ctx, k_cur), k_idxs);
    }
    ggml_tensor * res = ggml_set_rows(ctx, k, k_cur, k_idxs);
    res->src[3]       = mean;
    res->src[4]       = weight;
    return res;
}

// --- K-shift --------------------------------------------------------------------------------------------------------

class llama_kv_shift_input : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);
        ggml_backend_tensor_set(shift.by, by.data(), 0, ggml_nbytes(shift.by));
        ggml_backend_tensor_set(shift.rows, rows.data(), 0, ggml_nbytes(shift.rows));
    }

    const std::vector<llama_kv_cells> * v_cells = nullptr; // of the cache
    llama_kv_shift                      shift;
    std::vector<int32_t>                by, rows;
};

llama_kv_shift llama_kv_center_layer::shift(llm_graph_result * res, const std::vector<llama_kv_cells> & v_cells,
                                            const ggml_tensor * k, ggml_tensor * by) {
    if (!ggml_is_tbq(k->type)) {
        return { by, nullptr };
    }
    for (const auto & input : res->inputs) { // the layers share it
        const auto * inp = dynamic_cast<llama_kv_shift_input *>(input.get());
        if (inp && inp->v_cells == &v_cells) {
            return inp->shift;
        }
    }
    auto inp      = std::make_unique<llama_kv_shift_input>();
    inp->v_cells  = &v_cells;
    int32_t spare = 0; // an empty cell
    for (size_t s = 0, first = 0; s < v_cells.size(); first += v_cells[s++].size()) {
        for (uint32_t i = 0; i < v_cells[s].size(); ++i) {
            if (v_cells[s].is_empty(i)) {
                spare = (int32_t) (first + i);
            } else if (v_cells[s].get_shift(i) != 0) {
                inp->rows.push_back((int32_t) (first + i));
                inp->by.push_back(v_cells[s].get_shift(i));
            }
        }
    }
    if (inp->rows.empty()) { // all that moved was removed since, and left empty cells: a tensor needs a row
        inp->rows = { spare };
        inp->by   = { 0 };
    }
    inp->shift = { ggml_new_tensor_1d(res->get_ctx(), GGML_TYPE_I32, (int64_t) inp->by.size()),
                   ggml_new_tensor_1d(res->get_ctx(), GGML_TYPE_I32, (int64_t) inp->rows.size()) };
    ggml_set_input(inp->shift.by);
    ggml_set_input(inp->shift.rows);
    return static_cast<llama_kv_shift_input *>(res->add_input(std::move(inp)))->shift;
}

// the heads k as rows
static ggml_tensor * rows_of(ggml_context * ctx, ggml_tensor * k) {
    const int64_t n = k->ne[0] * k->ne[1];
    return k->view_src && n == k->view_src->ne[0] ? ggml_reshape_2d(ctx, k->view_src, n, k->ne[2])
                                                  : ggml_view_2d(ctx, k, n, k->ne[2], k->nb[2], 0);
}

ggml_tensor * llama_kv_center_layer::load(ggml_context * ctx, ggml_tensor * k, const llama_kv_shift & shift) const {
    if (!shift.rows) {
        return add(ctx, ggml_cast(ctx, k, GGML_TYPE_F32));
    }
    ggml_tensor * rows = ggml_get_rows(ctx, rows_of(ctx, k), shift.rows);
    return add(ctx, ggml_reshape_3d(ctx, rows, k->ne[0], k->ne[1], rows->ne[1]));
}

ggml_tensor * llama_kv_center_layer::store(ggml_context * ctx, ggml_tensor * k, ggml_tensor * moved,
                                           const llama_kv_shift & shift) const {
    if (!shift.rows) {
        return ggml_cpy(ctx, subtract(ctx, moved), k);
    }
    moved             = ggml_reshape_2d(ctx, moved, moved->ne[0] * moved->ne[1], moved->ne[2]);
    ggml_tensor * res = set_rows(ctx, rows_of(ctx, k), moved, shift.rows);
    if (mean && moved->ne[0] < mean->ne[0]) { // the channels that RoPE turns, of one head
        res->src[3] = ggml_view_1d(ctx, mean, moved->ne[0], n_embd_nope * sizeof(float));
        res->src[4] = weight ? ggml_view_1d(ctx, weight, moved->ne[0], n_embd_nope * sizeof(float)) : nullptr;
    }
    return res;
}

// --------------------------------------------------------------------------------------------------------------------

void llama_kv_center_layer::attend(ggml_tensor * fa, bool values) const {
    if (heads) {
        tbq_ggml_flash_attn_ext_center(fa, heads, values);
    }
}

ggml_tensor * llama_kv_center_layer::logits(ggml_context * ctx, ggml_tensor * kq, ggml_tensor * q) const {
    if (!heads) {
        return kq;
    }
    ggml_tensor * qc =
        ggml_mul_mat(ctx, ggml_view_3d(ctx, mean, n_embd_head, 1, heads->ne[1], heads->nb[1], heads->nb[1], 0), q);
    ggml_prec_set_acc(qc, GGML_PREC_F32);
    return ggml_add(ctx, kq, qc);
}

// A state begins with the number of streams.  That of a cache with a center has this instead, the hash, and then the
// rest; so states without one are upstream's, and an unpatched reader finds too many streams.
static constexpr uint32_t CENTER_MAGIC = 0x43544e43; // "CNTC"

void llama_kv_center::state_write(llama_io_write_i & io) const {
    if (!hash.empty()) {
        io.write(&CENTER_MAGIC, sizeof(CENTER_MAGIC));
        io.write(hash.data(), hash.size());
    }
}

void llama_kv_center::state_read(llama_io_read_i & io, uint32_t & n_stream) const {
    std::string saved;
    if (n_stream == CENTER_MAGIC) {
        saved.resize(64);
        io.read(saved.data(), saved.size());
        io.read(&n_stream, sizeof(n_stream));
        if (saved.find_first_not_of("0123456789abcdef") != std::string::npos) {
            throw std::runtime_error("the hash of the calibration file that this state names is corrupt");
        }
    }
    if (saved != hash) {
        const auto name = [](const std::string & h) {
            return h.empty() ? std::string("none") : h == ROTATED ? std::string("none, rotated") : h.substr(0, 12);
        };
        throw std::runtime_error(
            format("this state was saved with a different calibration file (hash %s; this context: %s)%s",
                   name(saved).c_str(), name(hash).c_str(), saved.empty() ? "; --cache-center none loads it" : ""));
    }
}

// --- in the context -------------------------------------------------------------------------------------------------

// Throws if the means of a layer do not fit the model or the context.
static void check_layer(const llama_context & ctx, const llama_center & center, uint32_t il) {
    const llama_hparams & hparams = ctx.get_model().hparams;
    const char *          path    = center.path.c_str();
    const auto            it      = center.layers.find(il);
    if (it == center.layers.end()) {
        throw std::runtime_error(format("%s has no means for layer %u", path, il));
    }
    const llama_center::layer & l = it->second;
    if (l.n_embd_head != (int64_t) hparams.n_embd_head_k(il) || l.n_head_kv != (int64_t) hparams.n_head_kv(il)) {
        throw std::runtime_error(format("%s: layer %u has %" PRId64 " heads of %" PRId64 " there and %u of %u here",
                                        path, il, l.n_head_kv, l.n_embd_head, hparams.n_head_kv(il),
                                        hparams.n_embd_head_k(il)));
    }
    if (!std::all_of(l.mean.begin(), l.mean.end(), [](float x) { return std::isfinite(x); }) ||
        !std::all_of(l.energy.begin(), l.energy.end(), [](float x) { return x >= 0 && x < 1e30f; })) {
        throw std::runtime_error(format("%s: the means of layer %u are not finite", path, il));
    }
    const std::vector<float> rope    = llama_center_rope(ctx, il);
    const std::string        factors = llama_center_rope_factors(ctx, il);
    if (l.rope != rope || l.rope_factors != factors) {
        throw std::runtime_error(format(
            "%s was measured with another RoPE (layer %u: base %g, scale %g, factors %s; here %g, %g, %s); measure again with the same options",
            path, il, l.rope.empty() ? 0.0 : l.rope[0], l.rope.size() < 2 ? 0.0 : l.rope[1], l.rope_factors.c_str(),
            rope[0], rope[1], factors.c_str()));
    }
}

// of the model, in llama_center_identity()
static constexpr size_t N_FINGERPRINT = 64;

// Throws if a center does not fit; the number of layers whose keys are centered.
static size_t check_center(const llama_context & ctx, const std::vector<llama_kv_cache *> & caches,
                           const llama_center & center) {
    const llama_model & model       = ctx.get_model();
    const std::string   fingerprint = llama_center_identity(ctx);
    if (center.arch == llm_arch_name(model.arch) && center.fingerprint != fingerprint &&
        center.fingerprint.substr(0, N_FINGERPRINT) == fingerprint.substr(0, N_FINGERPRINT)) {
        throw std::runtime_error(
            format("%s was measured with other adapters or control vectors; measure again with the same options",
                   center.path.c_str()));
    }
    if (center.arch != llm_arch_name(model.arch) || center.fingerprint != fingerprint) {
        throw std::runtime_error(format("%s was measured on another model (%s, tensors %s); this one is %s, %s",
                                        center.path.c_str(), center.arch.c_str(),
                                        center.fingerprint.substr(0, 12).c_str(), llm_arch_name(model.arch),
                                        fingerprint.substr(0, 12).c_str()));
    }
    size_t n_layer = 0, n_plain = 0;
    for (const llama_kv_cache * kv : caches) {
        if (kv->is_shared()) {
            throw std::runtime_error("this context reads the cache of another one");
        }
        const char * reason = nullptr;
        for (const uint32_t il : kv->get_layer_ids()) {
            n_layer++;
            check_layer(ctx, center, il);
            if (const char * why = llama_center_why_not(model, il, kv->type_k())) {
                reason = why;
                n_plain++;
            }
        }
        if (reason) {
            LLAMA_LOG_WARN("set_center: keys of type %s are not centered where there are %s: tbq types are\n",
                           ggml_type_name(kv->type_k()), reason);
        }
    }
    if (n_layer != center.layers.size()) {
        throw std::runtime_error(
            format("%s has means for %zu layers, the cache %zu", center.path.c_str(), center.layers.size(), n_layer));
    }
    return n_layer - n_plain;
}

void llama_center_check_empty(const llama_context & ctx) {
    for (llama_seq_id id = 0; id < (llama_seq_id) ctx.get_cparams().n_seq_max; ++id) {
        if (ctx.get_memory()->seq_pos_max(id) >= 0) {
            throw std::runtime_error("the cache holds keys already");
        }
    }
}

void llama_context::set_center(const llama_center * center) {
    const std::vector<llama_kv_cache *> caches = llama_center_caches(*this);
    llama_center_check_empty(*this);
    const size_t      n_layer = center ? check_center(*this, caches, *center) : 0;
    const std::string hash    = center ? center->hash() : "";

    sched_need_reserve = true; // the graphs get or lose an operation
    try {
        for (llama_kv_cache * kv : caches) {
            kv->set_center(center, hash);
        }
    } catch (...) { // no memory: not half of the layers
        for (llama_kv_cache * kv : caches) {
            kv->set_center(nullptr, "");
        }
        throw;
    }
    measured_adapters.reset();
    if (n_layer > 0) {
        measured_adapters = center_adapters();
        LLAMA_LOG_INFO(
            "%s: keys are stored minus their means: %zu layers, measured for a context of %u tokens, hash %s\n",
            __func__, n_layer, center->n_ctx, hash.substr(0, 12).c_str());
    }
}

void llama_context::note_adapters() {
    if (measured_adapters && *measured_adapters != center_adapters()) {
        LLAMA_LOG_WARN(
            "%s: the means of the keys were measured with other adapters or control vectors: correct, slightly less accurate\n",
            __func__);
        measured_adapters.reset(); // once
    }
}

// tbq serve looks for the name of the function that its option is about
static void log_refusal(const std::exception & err) {
    LLAMA_LOG_ERROR("llama_set_cache_center: %s\n", err.what());
}

llama_center * llama_center_load(const char * path) {
    try {
        return new llama_center(llama_center::load(path));
    } catch (const std::exception & err) {
        log_refusal(err);
        return nullptr;
    }
}

void llama_center_free(llama_center * center) {
    delete center;
}

int32_t llama_set_center(llama_context * ctx, const llama_center * center) {
    try {
        ctx->set_center(center);
        return 0;
    } catch (const std::exception & err) {
        log_refusal(err);
        return -1;
    }
}

int32_t llama_set_cache_center(llama_context * ctx, const char * path) {
    const std::unique_ptr<llama_center> center(path ? llama_center_load(path) : nullptr);
    return path && !center ? -1 : llama_set_center(ctx, center.get());
}
