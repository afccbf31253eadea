// SPDX-License-Identifier: MIT
// Centred keys, as a mechanism of the KV cache.  Why attention does not notice: docs/center.md.

#include "llama-center.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "hash/hash.h"
#include "tbq-ggml.h"
#include "tbq.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// --- what ties a file to a model ------------------------------------------------------------------------------------

// Names, types, shapes and the first and last bytes of all tensors.  The tensors of a split model come in any order and
// from any number of files, so they are sorted by name.
std::string llama_center_fingerprint(llama_model_loader & ml) {
    constexpr size_t n_sample = 64;

    std::map<std::string, const llama_model_loader::llama_tensor_weight *> sorted;
    for (const auto & [name, weight] : ml.weights_map) {
        sorted[name] = &weight;
    }

    std::string text;
    for (const auto & [name, weight] : sorted) {
        const ggml_tensor * t = weight->tensor;
        text += format("%s %d %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", name.c_str(), (int) t->type, t->ne[0],
            t->ne[1], t->ne[2], t->ne[3]);

        if (weight->idx >= ml.files.size()) {
            continue; // a model that was made in memory
        }
        const size_t size = ggml_nbytes(t);
        const size_t n    = std::min(size, n_sample);
        char sample[2*n_sample];
        ml.files[weight->idx]->seek(weight->offs, SEEK_SET);
        ml.files[weight->idx]->read_raw(sample, n);
        ml.files[weight->idx]->seek(weight->offs + size - n, SEEK_SET);
        ml.files[weight->idx]->read_raw(sample + n, n);
        text.append(sample, 2*n);
    }
    return hash_sha256_hex(text.data(), text.size());
}

namespace {

// RoPE as the context applies it: the keys' means depend on it.
std::vector<float> rope_of(const llama_context & ctx, int32_t il) {
    const llama_cparams & cparams = ctx.get_cparams();
    const llama_model   & model   = ctx.get_model();
    return { model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il), cparams.yarn_ext_factor,
             cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow, (float) cparams.n_ctx_orig_yarn };
}

std::string rope_factors_of(const llama_context & ctx, int32_t il) {
    const ggml_tensor * t = ctx.get_model().get_rope_factors(ctx.get_cparams(), il);
    return t ? ggml_get_name(t) : "none";
}

// Why the keys of a layer stay as they are, or NULL.  Both add something to the softmax that does not move with the
// logits of a query, so that a constant in all of them would no longer cancel.
const char * why_not(const llama_model & model, int32_t il) {
    if (model.layers[il].attn_sinks) {
        return "attention sinks";
    }
    if (model.hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return "a soft-cap of the attention logits";
    }
    return nullptr;
}

// The caches of a memory that hold keys of heads.  Others (latent vectors of MLA, which are values too; the keys of an
// indexer, whose scores see no softmax; recurrent states) are not for centring.
std::vector<llama_kv_cache *> caches_of(const llama_context & ctx, std::string & error) {
    const llama_model & model = ctx.get_model();
    llama_memory_i * memory = ctx.get_memory();

    if (model.hparams.is_mla()) {
        error = "a cell of MLA is key and value at once";
        return {};
    }
    if (model.arch != LLM_ARCH_DFLASH) { // some of them read their keys as values
        if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
            return { kv };
        }
        if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
            return { iswa->get_base(), iswa->get_swa() };
        }
        if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
            return { hybrid->get_mem_attn() };
        }
        if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
            return { hybrid->get_mem_attn()->get_base(), hybrid->get_mem_attn()->get_swa() };
        }
    }
    error = format("the memory of a %s model has no keys that can be centred", llm_arch_name(model.arch));
    return {};
}

} // namespace

// --- the file -------------------------------------------------------------------------------------------------------

static constexpr const char * NAME_MEAN   = "blk.%d.attn_k.center";
static constexpr const char * NAME_ENERGY = "blk.%d.attn_q.energy";

struct llama_center {
    std::string path;        // for messages
    std::string fingerprint; // of the model
    std::string arch;
    uint32_t    n_ctx    = 0;
    uint64_t    n_tokens = 0;
    struct layer {
        int64_t            n_embd_head; // head size
        int64_t            n_head_kv;
        std::vector<float> mean;        // [n_head_kv][n_embd_head]
        std::vector<float> energy;      // mean square of the queries that read these keys, the same shape
        std::vector<float> rope;
        std::string        rope_factors;
        float              share;       // of the energy, that the mean holds
    };
    std::map<int32_t, layer> layers;

    // of everything above but the path: damage shows, and two centers with one hash are the same
    std::string hash() const {
        std::string text = format("%s %s %u %" PRIu64 "\n", fingerprint.c_str(), arch.c_str(), n_ctx, n_tokens);
        for (const auto & [il, l] : layers) {
            text += format("%d %" PRId64 " %" PRId64 " %s\n", il, l.n_embd_head, l.n_head_kv, l.rope_factors.c_str());
            text.append((const char *) l.rope.data(), l.rope.size()*sizeof(float));
            text.append((const char *) &l.share,      sizeof(float));
            text.append((const char *) l.mean.data(),   l.mean.size()*sizeof(float));
            text.append((const char *) l.energy.data(), l.energy.size()*sizeof(float));
        }
        return hash_sha256_hex(text.data(), text.size());
    }

    void save(const char * path) const {
        ggml_init_params params = { /*.mem_size =*/ 2*layers.size()*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
        ggml_context_ptr ctx  { ggml_init(params) };
        gguf_context_ptr gguf { gguf_init_empty() };

        std::vector<float>       rope;
        std::vector<const char*> rope_factors;
        std::vector<float>       share;
        std::vector<int32_t>     ids;
        for (const auto & [il, l] : layers) {
            ids.push_back(il);
            share.push_back(l.share);
            rope.insert(rope.end(), l.rope.begin(), l.rope.end());
            rope_factors.push_back(l.rope_factors.c_str());
        }
        gguf_set_val_str (gguf.get(), "general.type",              "cache-center");
        gguf_set_val_u32 (gguf.get(), "cache_center.version",      1);
        gguf_set_val_str (gguf.get(), "cache_center.hash",         hash().c_str());
        gguf_set_val_str (gguf.get(), "cache_center.model",        fingerprint.c_str());
        gguf_set_val_str (gguf.get(), "cache_center.architecture", arch.c_str());
        gguf_set_val_u32 (gguf.get(), "cache_center.n_ctx",        n_ctx);
        gguf_set_val_u64 (gguf.get(), "cache_center.n_tokens",     n_tokens);
        gguf_set_arr_data(gguf.get(), "cache_center.layers",       GGUF_TYPE_INT32,   ids.data(),   ids.size());
        gguf_set_arr_data(gguf.get(), "cache_center.share",        GGUF_TYPE_FLOAT32, share.data(), share.size());
        gguf_set_arr_data(gguf.get(), "cache_center.rope",         GGUF_TYPE_FLOAT32, rope.data(),  rope.size());
        gguf_set_arr_str (gguf.get(), "cache_center.rope_factors", rope_factors.data(), rope_factors.size());
        for (const auto & [il, l] : layers) {
            const auto add = [&](const char * name, const std::vector<float> & values) {
                ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, l.n_embd_head, l.n_head_kv);
                ggml_format_name(t, name, il);
                gguf_add_tensor(gguf.get(), t);
                gguf_set_tensor_data(gguf.get(), t->name, values.data());
            };
            add(NAME_MEAN,   l.mean);
            add(NAME_ENERGY, l.energy);
        }
        if (!gguf_write_to_file(gguf.get(), path, /*only_meta =*/ false)) {
            throw std::runtime_error(format("%s cannot be written", path));
        }
    }

    static llama_center load(const char * path) {
        // the sizes that it declares, before memory is asked for
        {
            gguf_context_ptr meta { gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }) };
            if (!meta) {
                throw std::runtime_error(format("%s is no GGUF file, or a damaged one", path));
            }
            const uint64_t size = llama_file(path, "rb").size();
            uint64_t need = gguf_get_data_offset(meta.get());
            for (int64_t i = 0; i < gguf_get_n_tensors(meta.get()) && need <= size; ++i) {
                need += std::min<uint64_t>(gguf_get_tensor_size(meta.get(), i), size + 1);
            }
            if (need > size) {
                throw std::runtime_error(format("%s is damaged: it is shorter than its tensors", path));
            }
        }
        ggml_context * ctx_raw = nullptr;
        gguf_context_ptr gguf { gguf_init_from_file(path, { /*.no_alloc =*/ false, /*.ctx =*/ &ctx_raw }) };
        ggml_context_ptr ctx { ctx_raw };
        if (!gguf || !ctx) {
            throw std::runtime_error(format("%s is no GGUF file, or a damaged one", path));
        }

        const auto find = [&](const char * key, gguf_type type, bool array) {
            const int64_t id = gguf_find_key(gguf.get(), key);
            if (id < 0 || (array ? gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf.get(), id) != type
                                 : gguf_get_kv_type(gguf.get(), id) != type)) {
                throw std::runtime_error(format("%s holds no means of keys (%s is missing); llama-cache-center or tbq calibrate makes such a file", path, key));
            }
            return id;
        };
        const auto string = [&](const char * key) { return std::string(gguf_get_val_str(gguf.get(), find(key, GGUF_TYPE_STRING, false))); };

        if (gguf_get_val_u32(gguf.get(), find("cache_center.version", GGUF_TYPE_UINT32, false)) != 1) {
            throw std::runtime_error(format("%s is of a newer version", path));
        }
        llama_center res;
        res.path        = path;
        res.fingerprint = string("cache_center.model");
        res.arch        = string("cache_center.architecture");
        res.n_ctx       = gguf_get_val_u32(gguf.get(), find("cache_center.n_ctx",    GGUF_TYPE_UINT32, false));
        res.n_tokens    = gguf_get_val_u64(gguf.get(), find("cache_center.n_tokens", GGUF_TYPE_UINT64, false));

        const int64_t id_layers  = find("cache_center.layers",       GGUF_TYPE_INT32,   true);
        const int64_t id_share   = find("cache_center.share",        GGUF_TYPE_FLOAT32, true);
        const int64_t id_rope    = find("cache_center.rope",         GGUF_TYPE_FLOAT32, true);
        const int64_t id_factors = find("cache_center.rope_factors", GGUF_TYPE_STRING,  true);
        const size_t  n          = gguf_get_arr_n(gguf.get(), id_layers);
        const size_t  n_rope     = n ? gguf_get_arr_n(gguf.get(), id_rope)/n : 0;
        if (gguf_get_arr_n(gguf.get(), id_share) != n || gguf_get_arr_n(gguf.get(), id_factors) != n ||
                gguf_get_arr_n(gguf.get(), id_rope) != n*n_rope) {
            throw std::runtime_error(format("%s is damaged: its arrays have different lengths", path));
        }
        for (size_t i = 0; i < n; ++i) {
            const int32_t il = ((const int32_t *) gguf_get_arr_data(gguf.get(), id_layers))[i];
            const ggml_tensor * t = ggml_get_tensor(ctx.get(), format(NAME_MEAN,   il).c_str());
            const ggml_tensor * e = ggml_get_tensor(ctx.get(), format(NAME_ENERGY, il).c_str());
            if (!t || !e || t->type != GGML_TYPE_F32 || e->type != GGML_TYPE_F32 || ggml_n_dims(t) > 2 || !ggml_are_same_shape(t, e)) {
                throw std::runtime_error(format("%s is damaged: the means of layer %d are missing", path, il));
            }
            const float * rope   = (const float *) gguf_get_arr_data(gguf.get(), id_rope) + i*n_rope;
            const float * mean   = (const float *) t->data;
            const float * energy = (const float *) e->data;
            res.layers[il] = { t->ne[0], t->ne[1], { mean, mean + ggml_nelements(t) }, { energy, energy + ggml_nelements(e) }, { rope, rope + n_rope },
                gguf_get_arr_str(gguf.get(), id_factors, i), ((const float *) gguf_get_arr_data(gguf.get(), id_share))[i] };
        }
        if (res.hash() != string("cache_center.hash")) {
            throw std::runtime_error(format("%s is damaged: its contents have another hash", path));
        }
        return res;
    }
};

// --- in the cache ---------------------------------------------------------------------------------------------------

// Rotate heads as the graph does before it stores keys (build_input_k_rot): a rotation is linear, so the mean of rotated
// keys is the rotated mean.
static std::vector<float> rotated(const std::vector<float> & x, const std::vector<float> & rot, int64_t n_rot) {
    std::vector<float> res(x.size());
    for (size_t i = 0; i < x.size(); i += n_rot) {
        for (int64_t r = 0; r < n_rot; ++r) {
            double sum = 0.0;
            for (int64_t c = 0; c < n_rot; ++c) {
                sum += (double) rot[r*n_rot + c]*x[i + c];
            }
            res[i + r] = (float) sum;
        }
    }
    return res;
}

// What error costs in each channel of a block: the queries' energy there, pooled over two neighbours as the encoder wants
// it, to a power that trusts the sample a little less, and a floor.  docs/center.md has what was tried.
static std::vector<float> weights_of(const std::vector<float> & energy) {
    constexpr size_t n_block = TBQ_BLOCK;
    std::vector<float> res(energy.size());
    for (size_t b = 0; b + n_block <= energy.size(); b += n_block) {
        double sum = 0.0;
        for (size_t i = b; i < b + n_block; i += 2) {
            res[i] = res[i + 1] = std::pow(0.5f*(energy[i] + energy[i + 1]), 0.75f);
            sum += 2.0*res[i];
        }
        for (size_t i = b; i < b + n_block; ++i) {
            res[i] = sum > 0.0 ? (float) (res[i]/(sum/n_block)) + 0.1f : 1.0f;
        }
    }
    return res;
}

void llama_kv_cache::set_center(const llama_center * center, const std::string & hash) {
    if (center && other) {
        throw std::runtime_error("this context reads the cache of another one");
    }
    center_hash.clear();
    center_bufs.clear();
    for (auto & layer : layers) {
        layer.k_center = layer.k_weight = nullptr;
    }
    if (!center) {
        return;
    }

    // where they are used: for a tbq type beside the cache, in SET_ROWS; else where the keys are computed
    const auto upload = [&](const kv_layer & layer, const std::vector<float> & values) {
        ggml_init_params params = { /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
        ggml_context_ptr ctx { ggml_init(params) };
        ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, values.size());
        // named like the keys: with a split of tensors over devices it is the name that decides who holds which heads
        ggml_set_name(t, layer.k->name);
        ggml_backend_buffer_type_t buft = ggml_type_rotates(layer.k->type) ? ggml_backend_buffer_get_type(layer.k->buffer) : ggml_backend_dev_buffer_type(model.dev_layer(layer.il));
        ggml_backend_buffer_ptr buf { hparams.no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0) : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("failed to allocate the means of the keys");
        }
        if (hparams.no_alloc) {
            t->buffer = buf.get();
        } else {
            ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
        center_bufs.emplace_back(std::move(ctx), std::move(buf));
        return t;
    };
    for (auto & layer : layers) {
        const auto it = center->layers.find(layer.il);
        if (it == center->layers.end()) {
            continue;
        }
        int64_t n_rot = 64;
        while (attn_rot_k && n_embd_head_k_all % (2*n_rot) == 0) {
            n_rot *= 2;
        }
        layer.k_center = upload(layer, attn_rot_k ? rotated(it->second.mean, attn_rot_hadamard.at(n_rot), n_rot) : it->second.mean);
        if (ggml_type_rotates(layer.k->type)) {
            layer.k_weight = upload(layer, weights_of(it->second.energy));
        }
    }
    center_hash = hash;
}

ggml_tensor * llama_kv_cache::center_k(ggml_context * ctx, ggml_tensor * k, int32_t il, bool undo) const {
    ggml_tensor * mean = layers[map_layer_ids.at(il)].k_center;
    if (!mean) {
        return k;
    }
    if (k->ne[0] != mean->ne[0]) { // by heads, or the first channels of each
        mean = ggml_view_2d(ctx, mean, k->ne[0], k->ne[1], hparams.n_embd_head_k(il)*sizeof(float), 0);
    }
    return undo ? ggml_add(ctx, k, mean) : ggml_sub(ctx, k, mean);
}

// SET_ROWS of a tbq type subtracts the mean itself and weighs error by channel; for other types a SUB goes before it.
ggml_tensor * llama_kv_cache::center_set_rows(ggml_context * ctx, ggml_tensor * k, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il) const {
    const kv_layer & layer = layers[map_layer_ids.at(il)];
    const bool ours = ggml_type_rotates(k->type);
    ggml_tensor * res = ggml_set_rows(ctx, k, ours ? k_cur : center_k(ctx, k_cur, il), k_idxs);
    if (ours) {
        res->src[3] = layer.k_center;
        res->src[4] = layer.k_weight;
    }
    return res;
}

bool llama_kv_cache::is_centered(int32_t il) const {
    return layers[map_layer_ids.at(il)].k_center;
}

// A state begins with the number of streams.  That of a cache with a center has this instead, the hash, and then the
// rest; so states without one are upstream's, and an unpatched reader finds too many streams.
static constexpr uint32_t CENTER_MAGIC = 0x43544e43; // "CNTC"

void llama_kv_cache::center_state_write(llama_io_write_i & io) const {
    if (!center_hash.empty()) {
        io.write(&CENTER_MAGIC, sizeof(CENTER_MAGIC));
        io.write(center_hash.data(), center_hash.size());
    }
}

void llama_kv_cache::center_state_read(llama_io_read_i & io, uint32_t & n_stream) const {
    std::string hash;
    if (n_stream == CENTER_MAGIC) {
        hash.resize(64);
        io.read(hash.data(), hash.size());
        io.read(&n_stream, sizeof(n_stream));
        if (hash.find_first_not_of("0123456789abcdef") != std::string::npos) {
            throw std::runtime_error("the hash of the calibration file that this state names is corrupt");
        }
    }
    if (hash != center_hash) {
        const auto name = [](const std::string & h) { return h.empty() ? std::string("none") : h.substr(0, 12); };
        throw std::runtime_error(format("this state was saved with a different calibration file (hash %s; this context: %s)",
            name(hash).c_str(), name(center_hash).c_str()));
    }
}

// --- in the context -------------------------------------------------------------------------------------------------

void llama_context::set_center(const llama_center * means) {
    std::string error;
    const std::vector<llama_kv_cache *> caches = caches_of(*this, error);
    if (!error.empty()) {
        throw std::runtime_error(error);
    }
    for (llama_seq_id id = 0; id < (llama_seq_id) cparams.n_seq_max; ++id) {
        if (memory->seq_pos_max(id) >= 0) {
            throw std::runtime_error("the cache holds keys already");
        }
    }
    sched_need_reserve = true; // the graphs get or lose an operation
    if (!means) {
        for (llama_kv_cache * kv : caches) {
            kv->set_center(nullptr, "");
        }
        return;
    }

    const llama_center & center = *means;
    const char * path = center.path.c_str();
    if (center.arch != llm_arch_name(model.arch) || center.fingerprint != model.fingerprint) {
        throw std::runtime_error(format("%s was measured on another model (%s, tensors %s); this one is %s, %s", path,
            center.arch.c_str(), center.fingerprint.substr(0, 12).c_str(), llm_arch_name(model.arch), model.fingerprint.substr(0, 12).c_str()));
    }
    size_t n_layer = 0;
    for (const llama_kv_cache * kv : caches) {
        for (const uint32_t il : kv->get_layer_ids()) {
            if (const char * reason = why_not(model, il)) {
                LLAMA_LOG_WARN("%s: layer %u keeps its keys as they are: it has %s\n", __func__, il, reason);
                continue;
            }
            n_layer++;
            const auto it = center.layers.find(il);
            if (it == center.layers.end()) {
                throw std::runtime_error(format("%s has no means for layer %u", path, il));
            }
            const llama_center::layer & l = it->second;
            if (l.n_embd_head != (int64_t) model.hparams.n_embd_head_k(il) || l.n_head_kv != (int64_t) model.hparams.n_head_kv(il)) {
                throw std::runtime_error(format("%s: layer %u has %" PRId64 " heads of %" PRId64 " there and %u of %u here", path, il,
                    l.n_head_kv, l.n_embd_head, model.hparams.n_head_kv(il), model.hparams.n_embd_head_k(il)));
            }
            if (!std::all_of(l.mean.begin(),   l.mean.end(),   [](float x) { return std::isfinite(x); }) ||
                !std::all_of(l.energy.begin(), l.energy.end(), [](float x) { return x >= 0 && x < 1e30f; })) {
                throw std::runtime_error(format("%s: the means of layer %u are not finite", path, il));
            }
            const std::vector<float> rope = rope_of(*this, il);
            if (l.rope != rope || l.rope_factors != rope_factors_of(*this, il)) {
                throw std::runtime_error(format("%s was measured with another RoPE (layer %u: base %g, scale %g, factors %s; here %g, %g, %s); measure again with the same options",
                    path, il, l.rope.empty() ? 0.0 : l.rope[0], l.rope.size() < 2 ? 0.0 : l.rope[1], l.rope_factors.c_str(), rope[0], rope[1], rope_factors_of(*this, il).c_str()));
            }
        }
    }
    if (n_layer != center.layers.size()) {
        throw std::runtime_error(format("%s has means for %zu layers, the cache %zu", path, center.layers.size(), n_layer));
    }
    const std::string hash = center.hash();
    try {
        for (llama_kv_cache * kv : caches) {
            kv->set_center(&center, hash);
        }
    } catch (...) { // no memory: not half of the layers
        for (llama_kv_cache * kv : caches) {
            kv->set_center(nullptr, "");
        }
        throw;
    }
    LLAMA_LOG_INFO("%s: keys are stored less their means: %zu layers, measured for a context of %u tokens, hash %s\n", __func__,
        n_layer, center.n_ctx, hash.substr(0, 12).c_str());
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

// --- measuring ------------------------------------------------------------------------------------------------------

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
    std::string error;
    const std::vector<llama_kv_cache *> caches = caches_of(*ctx, error);
    if (!error.empty()) {
        LLAMA_LOG_ERROR("%s: nothing to measure: %s\n", __func__, error.c_str());
        return nullptr;
    }
    auto res = std::make_unique<llama_cache_center_stats>();
    const char * reason = "it has no layer with keys";
    for (const llama_kv_cache * kv : caches) {
        if (kv->type_k() != GGML_TYPE_F32 && kv->type_k() != GGML_TYPE_F16) {
            LLAMA_LOG_ERROR("%s: keys of type %s cannot be measured, f32 or f16 can\n", __func__, ggml_type_name(kv->type_k()));
            return nullptr;
        }
        for (const uint32_t il : kv->get_layer_ids()) {
            if (const char * why = why_not(ctx->get_model(), il)) {
                reason = why;
                continue;
            }
            res->layers[il].sum  .resize(ctx->get_model().hparams.n_embd_k_gqa(il));
            res->layers[il].query.resize(ctx->get_model().hparams.n_embd_k_gqa(il));
            res->caches[kv->get_k_storage(il)] = il;
        }
    }
    if (res->layers.empty()) {
        LLAMA_LOG_ERROR("%s: nothing to measure, the keys of this model stay as they are: %s\n", __func__, reason);
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
            (k->op == GGML_OP_CPY || k->op == GGML_OP_CONT || k->op == GGML_OP_VIEW || k->op == GGML_OP_PERMUTE || k->op == GGML_OP_RESHAPE)) {
        k = k->src[0];
    }
    const auto cache = stats->caches.find(k->view_src);
    if (cache == stats->caches.end() || q->type != GGML_TYPE_F32) {
        return false;
    }
    if (ask) {
        return true;
    }
    // q: [n_embd_head, n_tokens, n_head], a view in any order
    llama_cache_center_stats::layer & layer = stats->layers[cache->second];
    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head_kv   = layer.query.size()/n_embd_head;
    std::vector<uint8_t> raw(ggml_nbytes(q));
    ggml_backend_tensor_get(q, raw.data(), 0, raw.size());
    for (int64_t h = 0; h < q->ne[2]; ++h) {
        double * sum = layer.query.data() + h/(q->ne[2]/n_head_kv)*n_embd_head;
        for (int64_t i = 0; i < q->ne[1]; ++i) {
            const float * row = (const float *) (raw.data() + h*q->nb[2] + i*q->nb[1]);
            for (int64_t c = 0; c < n_embd_head; ++c) {
                sum[c] += (double) row[c]*row[c];
            }
        }
    }
    layer.n_query += q->ne[1]*(q->ne[2]/n_head_kv);
    return true;
}

int32_t llama_cache_center_stats_add(llama_cache_center_stats * stats, llama_context * ctx, llama_pos pos) {
    std::string error;
    ctx->synchronize();
    int32_t res = 0;
    for (llama_kv_cache * kv : caches_of(*ctx, error)) {
        const llama_kv_cells & cells = kv->get_cells(0);
        for (const uint32_t il : kv->get_layer_ids()) {
            const auto it = stats->layers.find(il);
            if (it == stats->layers.end()) {
                continue;
            }
            const ggml_tensor * k = kv->get_k_storage(il);
            const size_t n_embd = it->second.sum.size();
            std::vector<uint8_t> raw(ggml_row_size(k->type, n_embd));
            std::vector<float>   row(n_embd);
            int32_t n = 0;
            for (uint32_t i = 0; i < cells.size(); ++i) {
                if (cells.is_empty(i) || !cells.seq_has(i, 0) || cells.pos_get(i) < pos) {
                    continue;
                }
                ggml_backend_tensor_get(k, raw.data(), i*k->nb[1], raw.size());
                if (k->type == GGML_TYPE_F16) {
                    ggml_fp16_to_fp32_row((const ggml_fp16_t *) raw.data(), row.data(), n_embd);
                } else {
                    memcpy(row.data(), raw.data(), raw.size());
                }
                for (size_t j = 0; j < n_embd; ++j) {
                    it->second.sum[j] += row[j];
                    it->second.energy += (double) row[j]*row[j];
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
        square += sum*sum;
    }
    return (float) (square/it->second.n/it->second.energy);
}

uint32_t llama_cache_center_n_cells(const llama_model * model, uint32_t n_ctx, uint32_t n_chunk) {
    const bool long_rope = std::any_of(model->layers.begin(), model->layers.end(), [](const llama_layer & l) { return l.rope_long; });
    return long_rope && n_ctx > model->hparams.n_ctx_orig_yarn ? model->hparams.n_ctx_orig_yarn + n_chunk : n_chunk;
}

int32_t llama_cache_center_stats_save(const llama_cache_center_stats * stats, const llama_context * ctx, uint32_t n_ctx, const char * path) {
    const llama_model & model = ctx->get_model();
    llama_center center;
    center.fingerprint = model.fingerprint;
    center.arch        = llm_arch_name(model.arch);
    center.n_ctx       = n_ctx;
    for (const auto & [il, l] : stats->layers) {
        if (l.n == 0 || l.n_query == 0) {
            LLAMA_LOG_ERROR("%s: layer %d saw no %s\n", __func__, il, l.n ? "query" : "key");
            return -1;
        }
        std::vector<float> mean(l.sum.size());
        std::vector<float> energy(l.query.size());
        std::transform(l.sum.begin(),   l.sum.end(),   mean.begin(),   [&](double sum) { return (float) (sum/l.n); });
        std::transform(l.query.begin(), l.query.end(), energy.begin(), [&](double sum) { return (float) (sum/l.n_query); });
        center.n_tokens   = std::max(center.n_tokens, l.n);
        center.layers[il] = { model.hparams.n_embd_head_k(il), model.hparams.n_head_kv(il), std::move(mean), std::move(energy), rope_of(*ctx, il), rope_factors_of(*ctx, il),
            llama_cache_center_stats_share(stats, il) };
    }
    // the old file stays until the new one has been read back
    try {
        llama_file_replace out(path);
        center.save(out.path());
        llama_center::load(out.path());
        out.commit();
        return 0;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s: %s\n", __func__, path, err.what());
        return -1;
    }
}
