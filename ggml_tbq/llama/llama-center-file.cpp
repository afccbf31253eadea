// SPDX-License-Identifier: MIT
// The file of a center: what it holds, and what ties it to a model.

#include "llama-center-impl.h"

#include "llama-adapter.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "hash/hash.h"

#include <algorithm>
#include <cinttypes>
#include <filesystem>
#include <stdexcept>

// --- what ties a center to a model -----------------------------------------------------------------------------------

namespace {

using source_tensor = llama_center_source::tensor;

// the first and the last bytes of a tensor
std::string sample_of(llama_file & file, const source_tensor & tensor) {
    const size_t n = std::min<size_t>(tensor.size, 64);
    std::string  res(2 * n, '\0');
    file.seek(tensor.offset, SEEK_SET);
    file.read_raw(res.data(), n);
    file.seek(tensor.offset + tensor.size - n, SEEK_SET);
    file.read_raw(res.data() + n, n);
    return res;
}

} // namespace

std::shared_ptr<llama_center_source> llama_model_loader::center_source(const std::string &              fname,
                                                                       const std::vector<std::string> & splits) const {
    auto res = std::make_shared<llama_center_source>();
    if (!fname.empty()) {
        res->paths = splits.empty() ? std::vector<std::string>{ fname } : splits;
        for (std::string & path : res->paths) { // a program may change its current directory
            std::error_code             error;
            const std::filesystem::path absolute = std::filesystem::absolute(std::filesystem::u8path(path), error);
            path                                 = error ? path : absolute.u8string();
        }
    }
    // The tensors of a split model come in any order and from any number of files, so they are sorted by name.
    std::map<std::string, const llama_tensor_weight *> sorted;
    for (const auto & [name, weight] : weights_map) {
        sorted[name] = &weight;
    }
    for (const auto & [name, weight] : sorted) {
        const ggml_tensor * t      = weight->tensor;
        source_tensor       tensor = { format("%s %d %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", name.c_str(),
                                              (int) t->type, t->ne[0], t->ne[1], t->ne[2], t->ne[3]),
                                       weight->idx, weight->offs, ggml_nbytes(t), "" };
        // a FILE belongs to its owner, who may close it; a model that was made in memory has no file
        if (res->paths.empty() && weight->idx < files.size()) {
            tensor.sample = sample_of(*files[weight->idx], tensor);
        }
        res->tensors.push_back(std::move(tensor));
    }
    return res;
}

std::string llama_center_source::fingerprint() const {
    std::vector<std::unique_ptr<llama_file>> files(paths.size());
    std::string                              text;
    for (const tensor & t : tensors) {
        text += t.text;
        if (paths.empty()) {
            text += t.sample;
            continue;
        }
        try {
            if (!files[t.i_file]) {
                files[t.i_file] = std::make_unique<llama_file>(paths[t.i_file].c_str(), "rb");
            }
            text += sample_of(*files[t.i_file], t);
        } catch (const std::exception & err) {
            throw std::runtime_error(
                format("the model's file %s cannot be read again: %s", paths[t.i_file].c_str(), err.what()));
        }
    }
    return hash_sha256_hex(text.data(), text.size());
}

// The first and the last bytes of a tensor in memory.
static std::string sample_of(const ggml_tensor * t) {
    const size_t n = std::min<size_t>(ggml_nbytes(t), 64);
    std::string  res(2 * n, '\0');
    ggml_backend_tensor_get(t, res.data(), 0, n);
    ggml_backend_tensor_get(t, res.data() + n, ggml_nbytes(t) - n, n);
    return res;
}

static std::string shape_of(const std::string & name, const ggml_tensor * t) {
    return format("%s %d %" PRId64 " %" PRId64 "\n", name.c_str(), (int) t->type, t->ne[0], t->ne[1]);
}

std::string llama_context::center_adapters() const {
    std::vector<std::string> texts; // sorted: the order of adapters does not matter
    for (const auto & [adapter, scale] : *loras) {
        std::string text = format("lora %a %a\n", scale, adapter->alpha);
        for (const auto & [name, weight] : std::map(adapter->ab_map.begin(), adapter->ab_map.end())) {
            for (const ggml_tensor * t : { weight.a, weight.b }) {
                text += shape_of(name, t) + sample_of(t);
            }
        }
        texts.push_back(hash_sha256_hex(text.data(), text.size()));
    }
    std::sort(texts.begin(), texts.end());
    std::string res;
    for (const std::string & text : texts) {
        res += text;
    }
    std::string control;
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        if (const ggml_tensor * t = cvec->tensor_for((int) il)) {
            std::vector<float> values(ggml_nelements(t));
            ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
            if (std::any_of(values.begin(), values.end(), [](float x) { return x != 0.0f; })) {
                control += format("%u ", il);
                control.append((const char *) values.data(), ggml_nbytes(t));
            }
        }
    }
    res += control;
    return res.empty() ? "" : hash_sha256_hex(res.data(), res.size());
}

std::string llama_center_identity(const llama_context & ctx) {
    const std::string adapters = ctx.center_adapters();
    return ctx.get_model().center_source->fingerprint() + (adapters.empty() ? "" : " " + adapters);
}

// --- the file ------------------------------------------------------------------------------------------------------

static constexpr const char * NAME_MEAN   = "blk.%d.attn_k.center";
static constexpr const char * NAME_ENERGY = "blk.%d.attn_q.energy";

std::string llama_center::hash() const {
    std::string text = format("%s %s %u %" PRIu64 "\n", fingerprint.c_str(), arch.c_str(), n_ctx, n_tokens);
    for (const auto & [il, l] : layers) {
        text += format("%d %" PRId64 " %" PRId64 " %s\n", il, l.n_embd_head, l.n_head_kv, l.rope_factors.c_str());
        text.append((const char *) l.rope.data(), l.rope.size() * sizeof(float));
        text.append((const char *) &l.share, sizeof(float));
        text.append((const char *) l.mean.data(), l.mean.size() * sizeof(float));
        text.append((const char *) l.energy.data(), l.energy.size() * sizeof(float));
    }
    return hash_sha256_hex(text.data(), text.size());
}

void llama_center::save(const char * path) const {
    ggml_init_params params = { /*.mem_size =*/2 * layers.size() * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr,
                                /*.no_alloc =*/true };
    ggml_context_ptr ctx{ ggml_init(params) };
    gguf_context_ptr gguf{ gguf_init_empty() };

    std::vector<float>        rope;
    std::vector<const char *> rope_factors;
    std::vector<float>        share;
    std::vector<int32_t>      ids;
    for (const auto & [il, l] : layers) {
        ids.push_back(il);
        share.push_back(l.share);
        rope.insert(rope.end(), l.rope.begin(), l.rope.end());
        rope_factors.push_back(l.rope_factors.c_str());
    }
    gguf_set_val_str(gguf.get(), "general.type", "cache-center");
    gguf_set_val_u32(gguf.get(), "cache_center.version", 1);
    gguf_set_val_str(gguf.get(), "cache_center.hash", hash().c_str());
    gguf_set_val_str(gguf.get(), "cache_center.model", fingerprint.c_str());
    gguf_set_val_str(gguf.get(), "cache_center.architecture", arch.c_str());
    gguf_set_val_u32(gguf.get(), "cache_center.n_ctx", n_ctx);
    gguf_set_val_u64(gguf.get(), "cache_center.n_tokens", n_tokens);
    gguf_set_arr_data(gguf.get(), "cache_center.layers", GGUF_TYPE_INT32, ids.data(), ids.size());
    gguf_set_arr_data(gguf.get(), "cache_center.share", GGUF_TYPE_FLOAT32, share.data(), share.size());
    gguf_set_arr_data(gguf.get(), "cache_center.rope", GGUF_TYPE_FLOAT32, rope.data(), rope.size());
    gguf_set_arr_str(gguf.get(), "cache_center.rope_factors", rope_factors.data(), rope_factors.size());
    for (const auto & [il, l] : layers) {
        const auto add = [&](const char * name, const std::vector<float> & values) {
            ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, l.n_embd_head, l.n_head_kv);
            ggml_format_name(t, name, il);
            gguf_add_tensor(gguf.get(), t);
            gguf_set_tensor_data(gguf.get(), t->name, values.data());
        };
        add(NAME_MEAN, l.mean);
        add(NAME_ENERGY, l.energy);
    }
    if (!gguf_write_to_file(gguf.get(), path, /*only_meta =*/false)) {
        throw std::runtime_error(format("%s cannot be written", path));
    }
}

namespace {

// Throws if the file is shorter than the tensors that it declares: before memory is asked for.
void check_size(const char * path) {
    gguf_context_ptr meta{ gguf_init_from_file(path, { /*.no_alloc =*/true, /*.ctx =*/nullptr }) };
    if (!meta) {
        throw std::runtime_error(format("%s is not a GGUF file, or it is corrupt", path));
    }
    const uint64_t size = llama_file(path, "rb").size();
    uint64_t       need = gguf_get_data_offset(meta.get());
    for (int64_t i = 0; i < gguf_get_n_tensors(meta.get()) && need <= size; ++i) {
        need += std::min<uint64_t>(gguf_get_tensor_size(meta.get(), i), size + 1);
    }
    if (need > size) {
        throw std::runtime_error(format("%s is corrupt: it is shorter than its tensors", path));
    }
}

struct center_reader {
    const char *     path;
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;

    explicit center_reader(const char * path) : path(path) {
        ggml_context * ctx_raw = nullptr;
        gguf.reset(gguf_init_from_file(path, { /*.no_alloc =*/false, /*.ctx =*/&ctx_raw }));
        ctx.reset(ctx_raw);
        if (!gguf || !ctx) {
            throw std::runtime_error(format("%s is not a GGUF file, or it is corrupt", path));
        }
    }

    int64_t find(const char * key, gguf_type type, bool array = false) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        if (id < 0 ||
            (array ? gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf.get(), id) != type
                   : gguf_get_kv_type(gguf.get(), id) != type)) {
            throw std::runtime_error(format(
                "%s holds no means of keys (%s is missing); llama-cache-center or tbq calibrate makes such a file",
                path, key));
        }
        return id;
    }

    std::string string(const char * key) const { return gguf_get_val_str(gguf.get(), find(key, GGUF_TYPE_STRING)); }
    uint32_t    u32(const char * key) const { return gguf_get_val_u32(gguf.get(), find(key, GGUF_TYPE_UINT32)); }
    uint64_t    u64(const char * key) const { return gguf_get_val_u64(gguf.get(), find(key, GGUF_TYPE_UINT64)); }

    std::map<int32_t, llama_center::layer> layers() const {
        const int64_t id_layers  = find("cache_center.layers", GGUF_TYPE_INT32, true);
        const int64_t id_share   = find("cache_center.share", GGUF_TYPE_FLOAT32, true);
        const int64_t id_rope    = find("cache_center.rope", GGUF_TYPE_FLOAT32, true);
        const int64_t id_factors = find("cache_center.rope_factors", GGUF_TYPE_STRING, true);
        const size_t  n          = gguf_get_arr_n(gguf.get(), id_layers);
        const size_t  n_rope     = n ? gguf_get_arr_n(gguf.get(), id_rope) / n : 0;
        if (gguf_get_arr_n(gguf.get(), id_share) != n || gguf_get_arr_n(gguf.get(), id_factors) != n ||
            gguf_get_arr_n(gguf.get(), id_rope) != n * n_rope) {
            throw std::runtime_error(format("%s is corrupt: its arrays have different lengths", path));
        }
        std::map<int32_t, llama_center::layer> res;
        for (size_t i = 0; i < n; ++i) {
            const int32_t       il = ((const int32_t *) gguf_get_arr_data(gguf.get(), id_layers))[i];
            const ggml_tensor * t  = ggml_get_tensor(ctx.get(), format(NAME_MEAN, il).c_str());
            const ggml_tensor * e  = ggml_get_tensor(ctx.get(), format(NAME_ENERGY, il).c_str());
            if (!t || !e || t->type != GGML_TYPE_F32 || e->type != GGML_TYPE_F32 || ggml_n_dims(t) > 2 ||
                !ggml_are_same_shape(t, e)) {
                throw std::runtime_error(format("%s is corrupt: the means of layer %d are missing", path, il));
            }
            const float * rope   = (const float *) gguf_get_arr_data(gguf.get(), id_rope) + i * n_rope;
            const float * mean   = (const float *) t->data;
            const float * energy = (const float *) e->data;
            res[il]              = { t->ne[0],
                                     t->ne[1],
                                     { mean, mean + ggml_nelements(t) },
                                     { energy, energy + ggml_nelements(e) },
                                     { rope, rope + n_rope },
                                     gguf_get_arr_str(gguf.get(), id_factors, i),
                                     ((const float *) gguf_get_arr_data(gguf.get(), id_share))[i] };
        }
        return res;
    }
};

} // namespace

llama_center llama_center::load(const char * path) {
    check_size(path);
    const center_reader file(path);
    if (file.u32("cache_center.version") != 1) {
        throw std::runtime_error(format("%s is of a newer version", path));
    }
    llama_center res;
    res.path        = path;
    res.fingerprint = file.string("cache_center.model");
    res.arch        = file.string("cache_center.architecture");
    res.n_ctx       = file.u32("cache_center.n_ctx");
    res.n_tokens    = file.u64("cache_center.n_tokens");
    res.layers      = file.layers();
    if (res.hash() != file.string("cache_center.hash")) {
        throw std::runtime_error(format("%s is corrupt: its contents have another hash", path));
    }
    return res;
}
