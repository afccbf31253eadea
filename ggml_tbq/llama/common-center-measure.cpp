// SPDX-License-Identifier: MIT
#include "common-center-measure.h"

#include "common.h"

#include "../src/llama-ext.h" // hidden states for heads that predict further tokens

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
    cparams.type_v                = GGML_TYPE_F32; // MLA needs the type of K
    cparams.embeddings            = false;
    cparams.samplers              = nullptr;
    cparams.n_samplers            = 0;
    cparams.ctx_other             = nullptr; // a draft is measured by itself
    cparams.cb_eval               = llama_cache_center_stats_eval;
    cparams.cb_eval_user_data     = stats;
}

// The head of a model that predicts further tokens, in a context of its own: what it reads beside tokens are the hidden
// states of the model's context (main).
class predictor {
public:
    predictor(llama_context * main, llama_context * head) : main(main), head(head) {
        llama_set_embeddings_nextn(main, true, /*masked =*/false);
        llama_set_embeddings_nextn(head, true, /*masked =*/true);
    }

    // Behind a decode of the same tokens in main: token i goes with the state of the one before, as in speculative.cpp.
    bool decode(const std::vector<llama_token> & tokens, llama_pos pos) const {
        const size_t             n_embd = llama_model_n_embd_out(llama_get_model(head));
        const std::vector<float> first(n_embd, 0.0f);
        const float *            states = llama_get_embeddings_nextn(main);
        common_batch             batch(head);
        for (size_t i = 0; i < tokens.size(); ++i) {
            const int32_t idx = batch.add(tokens[i], pos + (llama_pos) i, 0, i + 1 == tokens.size());
            batch.set_embd(idx, { i > 0 ? states + (i - 1) * n_embd : first.data(), 1, n_embd });
        }
        llama_memory_clear(llama_get_memory(head), true);
        bool res = states != nullptr;
        // each head of a chain keeps the keys of its layer in the same cells
        const int32_t n_heads = std::max(1, (int32_t) llama_model_n_layer_nextn(llama_get_model(head)));
        for (int32_t i = 0; i < n_heads && res; ++i) {
            if (n_heads > 1) {
                llama_memory_seq_rm(llama_get_memory(head), 0, -1, -1);
                llama_set_nextn_layer_offset(head, i);
            }
            res = llama_process(head, LLAMA_PROCESS_TYPE_DECODE, batch.get()) == 0;
        }
        return res;
    }

private:
    llama_context * main;
    llama_context * head;
};

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

void common_center_set_adapters(llama_context * ctx, const common_params & params) {
    if (!params.lora_init_without_apply && !params.lora_adapters.empty()) {
        std::vector<common_adapter_lora_info> adapters = params.lora_adapters;
        common_set_adapter_lora(ctx, adapters);
    }
    if (!params.control_vectors.empty()) {
        const common_control_vector_data control = common_control_vector_load(params.control_vectors);
        const int32_t                    first   = std::max(1, params.control_vector_layer_start);
        const int32_t last = params.control_vector_layer_end > 0 ? params.control_vector_layer_end
                                                                 : llama_model_n_layer(llama_get_model(ctx));
        if (control.n_embd == -1 ||
            llama_set_adapter_cvec(ctx, control.data.data(), control.data.size(), control.n_embd, first, last) != 0) {
            throw std::runtime_error("a control vector cannot be used, see above");
        }
    }
}

common_center_ptr common_center_measure(llama_model * model, llama_context_params cparams,
                                        const common_center_job & job) {
    const uint32_t n_chunk = std::min(N_CHUNK, job.n_ctx);
    if (n_chunk <= N_SKIP) {
        throw std::runtime_error(
            string_format("a context of %u tokens is too short, %u are the least", job.n_ctx, N_SKIP + 1));
    }
    llama_cache_center_stats * counting = nullptr;
    const llama_context *      other    = cparams.ctx_type == LLAMA_CONTEXT_TYPE_MTP ? cparams.ctx_other : nullptr;
    set_up(cparams, llama_cache_center_n_cells(model, job.n_ctx, n_chunk), n_chunk, &counting);
    llama_context_ptr main;
    if (other) {
        llama_context_params main_params = cparams;
        main_params.ctx_type             = LLAMA_CONTEXT_TYPE_DEFAULT;
        main_params.cb_eval              = nullptr;
        main.reset(llama_init_from_model(const_cast<llama_model *>(llama_get_model(other)), main_params));
        cparams.ctx_other = main.get();
    }
    const llama_context_ptr ctx{ other && !main ? nullptr : llama_init_from_model(model, cparams) };
    if (!ctx) {
        throw std::runtime_error("no context for measuring, see above");
    }
    const std::unique_ptr<predictor> head(main ? new predictor(main.get(), ctx.get()) : nullptr);
    const stats_ptr                  stats{ llama_cache_center_stats_init(ctx.get()) };
    if (!stats) {
        throw std::runtime_error("there is nothing to measure, see above");
    }
    counting = stats.get();
    if (job.on_context) {
        job.on_context(ctx.get());
    }

    const llama_vocab * vocab  = llama_model_get_vocab(model);
    const chunking      chunks = cut(vocab, job, n_chunk); // long texts take a while
    for (uint32_t i = 0; i < chunks.n_chunks; ++i) {
        const llama_pos                pos    = chunks.pos(i);
        const std::vector<llama_token> tokens = chunks.tokens(i, vocab);
        if (head ? !decode(main.get(), tokens, pos) || !head->decode(tokens, pos) : !decode(ctx.get(), tokens, pos)) {
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
