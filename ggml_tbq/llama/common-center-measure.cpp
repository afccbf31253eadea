// SPDX-License-Identifier: MIT
#include "common-center-measure.h"

#include "common.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace {

constexpr uint32_t N_CHUNK  = 128; // tokens of a chunk
constexpr uint32_t N_CHUNKS = 8;
constexpr uint32_t N_SKIP =
    8; // the first keys of a chunk are attention sinks: far from the others, and few in a context

struct stats_deleter {
    void operator()(llama_cache_center_stats * stats) { llama_cache_center_stats_free(stats); }
};
using stats_ptr = std::unique_ptr<llama_cache_center_stats, stats_deleter>;

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
};

std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text) {
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE) {
        return common_tokenize(vocab, text, /*add_special =*/false);
    }
    std::vector<llama_token> tokens; // a random model, to measure speed on: any tokens serve
    for (const unsigned char c : text) {
        tokens.push_back(c % llama_vocab_n_tokens(vocab));
    }
    return tokens;
}

chunking cut(const llama_vocab * vocab, const common_center_job & job, uint32_t n_chunk) {
    chunking chunks{ job.n_ctx, n_chunk, 0, llama_vocab_get_add_bos(vocab), tokenize(vocab, job.text) };
    chunks.n_chunks =
        std::min((uint32_t) chunks.text.size() / chunks.n_text(), job.n_chunks > 0 ? job.n_chunks : N_CHUNKS);
    if (chunks.n_chunks == 0) {
        throw std::runtime_error(
            string_format("the text has %zu tokens, a chunk takes %u", chunks.text.size(), chunks.n_text()));
    }
    return chunks;
}

// Uncentered keys of f32, in few cells: the chunks overwrite each other.  The rest, RoPE for example, stays.
void set_up(llama_context_params & cparams, uint32_t n_cells, uint32_t n_chunk, llama_cache_center_stats ** stats) {
    cparams.n_ctx                 = n_cells;
    cparams.n_batch               = n_chunk;
    cparams.n_ubatch              = n_chunk; // a window of attention may be shorter; the cells of one batch stay
    cparams.n_seq_max             = 1;
    cparams.n_rs_seq              = 0;
    cparams.n_outputs_max         = 1;
    cparams.n_outputs_max_per_seq = 1;
    cparams.type_k                = GGML_TYPE_F32;
    cparams.type_v                = GGML_TYPE_F32; // MLA needs the type of K, to be refused for the right reason
    cparams.embeddings            = false;
    cparams.samplers              = nullptr;
    cparams.n_samplers            = 0;
    cparams.cb_eval               = llama_cache_center_stats_eval;
    cparams.cb_eval_user_data     = stats;
}

// Decodes tokens at pos, pos + 1, ... in an empty memory.
bool decode(llama_context * ctx, const std::vector<llama_token> & tokens, llama_pos pos) {
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens    = tokens.size();
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i == batch.n_tokens - 1;
    }
    const int32_t status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status == 0;
}

} // namespace

common_center_ptr common_center_measure(llama_model * model, llama_context_params cparams,
                                        const common_center_job & job) {
    const uint32_t n_chunk = std::min(N_CHUNK, job.n_ctx);
    if (n_chunk <= N_SKIP) {
        throw std::runtime_error(
            string_format("a context of %u tokens is too short, %u are the least", job.n_ctx, N_SKIP + 1));
    }
    llama_cache_center_stats * counting = nullptr;
    set_up(cparams, llama_cache_center_n_cells(model, job.n_ctx, n_chunk), n_chunk, &counting);
    const llama_context_ptr ctx{ llama_init_from_model(model, cparams) };
    if (!ctx) {
        throw std::runtime_error("no context for measuring, see above");
    }
    const stats_ptr stats{ llama_cache_center_stats_init(ctx.get()) };
    if (!stats) {
        throw std::runtime_error("there is nothing to measure, see above");
    }
    counting = stats.get();

    const llama_vocab * vocab  = llama_model_get_vocab(model);
    const chunking      chunks = cut(vocab, job, n_chunk); // long texts take a while
    for (uint32_t i = 0; i < chunks.n_chunks; ++i) {
        const llama_pos pos = chunks.pos(i);
        if (!decode(ctx.get(), chunks.tokens(i, vocab), pos)) {
            throw std::runtime_error(string_format("decoding failed at chunk %u", i));
        }
        if (llama_cache_center_stats_add(stats.get(), ctx.get(), pos + N_SKIP) <= 0) {
            throw std::runtime_error(string_format("the cache holds no keys of chunk %u", i));
        }
        if (job.on_chunk) {
            job.on_chunk(stats.get(), i + 1, chunks.n_chunks, pos + n_chunk);
        }
    }
    common_center_ptr res{ llama_cache_center_stats_get(stats.get(), ctx.get(), job.n_ctx) };
    if (!res) {
        throw std::runtime_error("the means are incomplete, see above");
    }
    return res;
}
