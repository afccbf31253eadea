// SPDX-License-Identifier: MIT
// llama-cache-center: measure the mean of a model's keys and write it into a small GGUF file.
//
//     llama-cache-center -m model.gguf -f text.txt -c 8192 -o model.center.gguf
//
// The mean of keys depends on their positions, because RoPE rotates a key by its position: channels that rotate fast
// average out, slow channels stay.  So the text is cut into chunks, at positions from the whole context (-c).  A chunk
// sees only itself: on average its keys are those of a long context, at a fraction of the time.

#include "llama-center.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr uint32_t N_CHUNK  = 128; // tokens of a chunk
constexpr uint32_t N_CHUNKS = 8;   // unless --chunks says otherwise
constexpr uint32_t N_SKIP =
    8; // the first keys of a chunk are attention sinks: far from the others, and few in a context

void print_usage(int, char ** argv) {
    LOG("\nexample usage:\n\n    %s -m model.gguf -f text.txt -c 8192 -o model.center.gguf [--chunks 8] [-ngl 99]\n\n",
        argv[0]);
}

// Decodes tokens at pos, pos + 1, ... in an empty memory.
bool decode(llama_context * ctx, const llama_token * tokens, int32_t n, llama_pos pos) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens    = n;
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
using stats_ptr = std::unique_ptr<llama_cache_center_stats, stats_deleter>;

// Uncentered keys of f32, in few cells: the chunks overwrite each other.
void set_up(common_params & params, uint32_t n_chunk) {
    params.warmup       = false;
    params.n_parallel   = 1;
    params.n_batch      = n_chunk;
    params.n_ubatch     = n_chunk; // a window of attention may be shorter than a chunk; the cells of one batch stay
    params.cache_type_k = GGML_TYPE_F32;
    params.cache_type_v = GGML_TYPE_F32; // MLA needs the type of K, to be refused for the right reason
    params.fit_params   = false;
    params.cache_center.clear();
}

// NULL, and the reason is in the log, for a model that cannot be measured.
llama_model_ptr load_model(common_params & params) {
    llama_model_ptr model{ llama_model_load_from_file(params.model.path.c_str(),
                                                      common_model_params_to_llama(params)) };
    if (!model) {
        LOG_ERR("error: %s cannot be loaded\n", params.model.path.c_str());
        return nullptr;
    }
    if (llama_model_has_encoder(model.get()) || !params.lora_adapters.empty() || !params.control_vectors.empty()) {
        LOG_ERR(
            "error: models with an encoder, adapters and control vectors are not for this program: measure the model itself\n");
        return nullptr;
    }
    return model;
}

std::vector<llama_token> tokenize(const llama_context * ctx, const std::string & text) {
    const llama_vocab * vocab = llama_model_get_vocab(llama_get_model(ctx));
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE) {
        return common_tokenize(ctx, text, /*add_special =*/false);
    }
    std::vector<llama_token> tokens; // a random model, to measure speed on: any tokens serve
    for (const unsigned char c : text) {
        tokens.push_back(c % llama_vocab_n_tokens(vocab));
    }
    return tokens;
}

// Where the chunks of a text are taken from, and at which positions they are decoded.
struct chunking {
    uint32_t                 n_ctx;
    uint32_t                 n_chunk; // tokens of a chunk, with the token for the beginning of a text
    uint32_t                 n_chunks;
    bool                     bos;
    std::vector<llama_token> text;

    uint32_t n_text() const { return n_chunk - bos; }

    // The text's chunks lie evenly over it: the beginning of a text is not like the rest.
    std::vector<llama_token> tokens(uint32_t i, const llama_vocab * vocab) const {
        std::vector<llama_token> res;
        if (bos) {
            res.push_back(llama_vocab_bos(vocab));
        }
        const auto begin = text.begin() + (n_chunks > 1 ? (size_t) i * (text.size() - n_text()) / (n_chunks - 1) : 0);
        res.insert(res.end(), begin, begin + n_text());
        return res;
    }

    // Half of the chunks are in the first quarter of the context: one center serves shorter contexts, too.  In a short
    // context the chunks overlap.
    llama_pos pos(uint64_t i) const {
        const uint64_t last = n_ctx - n_chunk;
        const uint64_t n    = n_chunks - 1;
        return (llama_pos) (n > 0 ? i * i * last / (n * n) : 0);
    }

    // After an eighth, a quarter, half and all of the chunks.
    bool is_reported(uint32_t n_done) const {
        const uint32_t eighths = 8 * n_done / n_chunks;
        return n_done == n_chunks || ((8 * n_done) % n_chunks == 0 && (eighths == 1 || eighths == 2 || eighths == 4));
    }
};

// Of each layer, by the tokens of context that the keys are taken over.
using shares_table = std::vector<std::pair<uint32_t, std::vector<float>>>;

// Decodes all chunks and counts their keys.  False, and the reason is in the log, if that fails.
bool measure(llama_context * ctx, llama_cache_center_stats * stats, const chunking & chunks, shares_table & shares) {
    const llama_model * model   = llama_get_model(ctx);
    const int32_t       n_layer = llama_model_n_layer(model);
    for (uint32_t i = 0; i < chunks.n_chunks; ++i) {
        const llama_pos                pos   = chunks.pos(i);
        const std::vector<llama_token> chunk = chunks.tokens(i, llama_model_get_vocab(model));
        if (!decode(ctx, chunk.data(), chunk.size(), pos)) {
            LOG_ERR("error: decoding failed at chunk %u\n", i);
            return false;
        }
        if (llama_cache_center_stats_add(stats, ctx, pos + N_SKIP) <= 0) {
            LOG_ERR("error: the cache holds no keys of chunk %u\n", i);
            return false;
        }
        LOG("chunk %u/%u\n", i + 1, chunks.n_chunks); // tbq calibrate reads these
        if (chunks.is_reported(i + 1)) {
            std::vector<float> column;
            for (int32_t il = 0; il < n_layer; ++il) {
                column.push_back(llama_cache_center_stats_share(stats, il));
            }
            shares.emplace_back(pos + chunks.n_chunk, std::move(column));
        }
    }
    return true;
}

void print(const shares_table & shares) {
    LOG("share of the keys' energy in their mean, by the tokens of context that it is taken over\nlayer");
    for (const auto & [n, column] : shares) {
        LOG(" %8u", n);
    }
    LOG("\n");
    for (size_t il = 0; il < shares.back().second.size(); ++il) {
        if (shares.back().second[il] < 0) {
            continue;
        }
        LOG("%5zu", il);
        for (const auto & [n, column] : shares) {
            LOG(" %8.4f", column[il]);
        }
        LOG("\n");
    }
}

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
    set_up(params, n_chunk);
    const llama_model_ptr model = load_model(params);
    if (!model) {
        return 1;
    }
    params.n_ctx                        = llama_cache_center_n_cells(model.get(), n_ctx, n_chunk);
    llama_cache_center_stats * counting = nullptr;
    llama_context_params       cparams  = common_context_params_to_llama(params);
    cparams.cb_eval                     = llama_cache_center_stats_eval;
    cparams.cb_eval_user_data           = &counting;
    const llama_context_ptr ctx{ llama_init_from_model(model.get(), cparams) };
    if (!ctx) {
        LOG_ERR("error: no context for %s\n", params.model.path.c_str());
        return 1;
    }
    const stats_ptr stats{ llama_cache_center_stats_init(ctx.get()) };
    if (!stats) {
        return 1;
    }
    counting = stats.get();

    chunking chunks{ n_ctx, n_chunk, 0, llama_vocab_get_add_bos(llama_model_get_vocab(model.get())),
                     tokenize(ctx.get(), params.prompt) };
    chunks.n_chunks = std::min((uint32_t) chunks.text.size() / chunks.n_text(),
                               params.n_chunks > 0 ? (uint32_t) params.n_chunks : N_CHUNKS);
    if (chunks.n_chunks == 0) {
        LOG_ERR("error: the text has %zu tokens, a chunk takes %u\n", chunks.text.size(), chunks.n_text());
        return 1;
    }
    shares_table shares;
    if (!measure(ctx.get(), stats.get(), chunks, shares)) {
        return 1;
    }
    print(shares);
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
