// SPDX-License-Identifier: MIT
// llama-cache-center: measure the mean of a model's keys and write it into a small GGUF file.
//
//     llama-cache-center -m model.gguf -f text.txt -c 8192 -o model.center.gguf
//
// A key's mean depends on the positions that it is taken over, because RoPE turns keys by their position: channels that
// turn often in a context average out, slow ones stay.  So the text is cut into chunks that lie evenly over the
// context (-c).  A chunk sees only itself: its keys are those of a long context on average, at a fraction of the time.

#include "llama-center.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace {

constexpr uint32_t N_CHUNK  = 128; // tokens of a chunk
constexpr uint32_t N_CHUNKS = 8;   // unless --chunks says otherwise
constexpr uint32_t N_SKIP   = 8;   // the first keys of a chunk are attention sinks: far from the others, and few in a context

void print_usage(int, char ** argv) {
    LOG("\nexample usage:\n\n    %s -m model.gguf -f text.txt -c 8192 -o model.center.gguf [--chunks 8] [-ngl 99]\n\n", argv[0]);
}

// Decode tokens at pos, pos + 1, ... in an empty memory.
bool decode(llama_context * ctx, const llama_token * tokens, int32_t n, llama_pos pos) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int32_t i = 0; i < n; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i == n - 1;
    }
    const int32_t status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status == 0;
}

struct stats_deleter {
    void operator()(llama_cache_center_stats * stats) { llama_cache_center_stats_free(stats); }
};

int run(common_params & params) {
    const uint32_t n_ctx = params.n_ctx;
    if (params.out_file.empty() || params.prompt.empty()) {
        LOG_ERR("error: a text (-f) and a file to write (-o) are needed\n");
        return 1;
    }
    const uint32_t n_chunk = std::min(N_CHUNK, n_ctx);
    if (n_chunk <= N_SKIP) {
        LOG_ERR("error: a context of %u tokens is too short, %u are the least\n", n_ctx, N_SKIP + 1);
        return 1;
    }

    // keys as they are, in few cells: the chunks overwrite each other
    params.warmup       = false;
    params.n_parallel   = 1;
    params.n_batch      = n_chunk;
    params.n_ubatch     = n_chunk; // a window of attention may be shorter than a chunk; the cells of one batch stay
    params.cache_type_k = GGML_TYPE_F32;
    params.cache_type_v = GGML_TYPE_F32; // MLA wants both alike, to be refused for what it is
    params.fit_params   = false;
    params.cache_center.clear();
    llama_model_ptr model { llama_model_load_from_file(params.model.path.c_str(), common_model_params_to_llama(params)) };
    if (!model) {
        LOG_ERR("error: %s cannot be loaded\n", params.model.path.c_str());
        return 1;
    }
    if (llama_model_has_encoder(model.get()) || !params.lora_adapters.empty() || !params.control_vectors.empty()) {
        LOG_ERR("error: models with an encoder, adapters and control vectors are not for this program: measure the model itself\n");
        return 1;
    }
    params.n_ctx = llama_cache_center_n_cells(model.get(), n_ctx, n_chunk);
    llama_cache_center_stats * counting = nullptr;
    llama_context_params cparams = common_context_params_to_llama(params);
    cparams.cb_eval           = llama_cache_center_stats_eval;
    cparams.cb_eval_user_data = &counting;
    llama_context_ptr ctx { llama_init_from_model(model.get(), cparams) };
    if (!ctx) {
        LOG_ERR("error: no context for %s\n", params.model.path.c_str());
        return 1;
    }
    std::unique_ptr<llama_cache_center_stats, stats_deleter> stats { llama_cache_center_stats_init(ctx.get()) };
    if (!stats) {
        return 1;
    }
    counting = stats.get();

    // in a short context the chunks overlap
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    std::vector<llama_token> tokens;
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) { // a model of a shape, to measure speed on: any tokens will do
        for (const unsigned char c : params.prompt) {
            tokens.push_back(c % llama_vocab_n_tokens(vocab));
        }
    } else {
        tokens = common_tokenize(ctx.get(), params.prompt, /*add_special =*/ false);
    }
    const bool     bos      = llama_vocab_get_add_bos(vocab);
    const uint32_t n_text   = n_chunk - bos;
    const uint32_t n_asked  = params.n_chunks > 0 ? params.n_chunks : N_CHUNKS;
    const uint32_t n_chunks = std::min((uint32_t) tokens.size()/n_text, n_asked);
    if (n_chunks == 0) {
        LOG_ERR("error: the text has %zu tokens, a chunk takes %u\n", tokens.size(), n_text);
        return 1;
    }
    // the text's own chunks lie evenly over it, too: the beginning of a text is not like the rest
    const auto spread = [](uint32_t i, uint32_t n, size_t last) { return n > 1 ? (size_t) i*last/(n - 1) : 0; };
    // half of the chunks in the first quarter of the context: one center serves shorter contexts, too
    const auto position = [](uint64_t i, uint64_t n, uint64_t last) { return (llama_pos) (n > 1 ? i*i*last/((n - 1)*(n - 1)) : 0); };

    const int32_t n_layer = llama_model_n_layer(model.get());
    std::vector<std::pair<uint32_t, std::vector<float>>> shares; // by the tokens of context covered
    for (uint32_t i = 0; i < n_chunks; ++i) {
        const llama_pos pos = position(i, n_chunks, n_ctx - n_chunk);
        std::vector<llama_token> chunk;
        if (bos) {
            chunk.push_back(llama_vocab_bos(vocab));
        }
        const auto begin = tokens.begin() + spread(i, n_chunks, tokens.size() - n_text);
        chunk.insert(chunk.end(), begin, begin + n_text);
        if (!decode(ctx.get(), chunk.data(), chunk.size(), pos)) {
            LOG_ERR("error: decoding failed at chunk %u\n", i);
            return 1;
        }
        if (llama_cache_center_stats_add(stats.get(), ctx.get(), pos + N_SKIP) <= 0) {
            LOG_ERR("error: the cache holds no keys of chunk %u\n", i);
            return 1;
        }
        LOG("chunk %u/%u\n", i + 1, n_chunks); // tbq calibrate reads these
        const uint32_t done = i + 1;
        if (done == n_chunks || (8*done) % n_chunks == 0) {
            const uint32_t part = 8*done/n_chunks; // eighths
            if (done == n_chunks || part == 1 || part == 2 || part == 4) {
                std::vector<float> column;
                for (int32_t il = 0; il < n_layer; ++il) {
                    column.push_back(llama_cache_center_stats_share(stats.get(), il));
                }
                shares.emplace_back(pos + n_chunk, std::move(column));
            }
        }
    }

    LOG("share of the keys' energy in their mean, by the tokens of context that it is taken over\nlayer");
    for (const auto & [n, column] : shares) {
        LOG(" %8u", n);
    }
    LOG("\n");
    for (int32_t il = 0; il < n_layer; ++il) {
        if (shares.back().second[il] < 0) {
            continue;
        }
        LOG("%5d", il);
        for (const auto & [n, column] : shares) {
            LOG(" %8.4f", column[il]);
        }
        LOG("\n");
    }
    if (llama_cache_center_stats_save(stats.get(), ctx.get(), n_ctx, params.out_file.c_str()) != 0) {
        LOG_ERR("error: %s was not written\n", params.out_file.c_str());
        return 1;
    }
    return 0;
}

} // namespace

int main(int argc, char ** argv) {
    common_params params;
    params.n_ctx  = 8192;
    params.escape = false;
    common_init();
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_IMATRIX, print_usage)) {
        return 1;
    }
    llama_backend_init();
    llama_numa_init(params.numa);
    const int status = run(params);
    llama_backend_free();
    return status;
}
