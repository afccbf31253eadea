// SPDX-License-Identifier: MIT
// Logits of a model with a cache of some types:  logits MODEL DEVICE K V FLASH RECENT SPLIT CENTER OUT
//
// DEVICE: CPU or GPU.  K, V: types of the cache.  FLASH: 1 with flash attention.  RECENT: rows that are kept in 8 bits as
// well.  SPLIT: tokens that are decoded at a time.  CENTER: a file, or none.  OUT: float32 of all N tokens in turn.
#include <llama.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

static const int N = 96;

static ggml_type type_of(const char * name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * const known = ggml_type_name((ggml_type) i);
        if (known && !std::strcmp(known, name)) {
            return (ggml_type) i;
        }
    }
    std::fprintf(stderr, "no type %s\n", name);
    std::exit(2);
}

static void check(bool fine, const char * what) {
    if (!fine) {
        std::fprintf(stderr, "%s failed\n", what);
        std::exit(1);
    }
}

int main(int argc, char ** argv) {
    check(argc == 10, "reading 9 arguments");
    const bool on_cpu = !std::strcmp(argv[2], "CPU");

    ggml_backend_load_all();
    // no device at all, because one would be used for products with many rows
    ggml_backend_dev_t none[] = { nullptr };
    auto               load   = llama_model_default_params();
    load.n_gpu_layers         = on_cpu ? 0 : 999;
    load.devices              = on_cpu ? none : nullptr;
    llama_model * const model = llama_model_load_from_file(argv[1], load);
    check(model != nullptr, "loading the model");

    auto parameters            = llama_context_default_params();
    parameters.n_ctx           = 512;
    parameters.n_batch         = 512;
    parameters.n_ubatch        = 512;
    parameters.type_k          = type_of(argv[3]);
    parameters.type_v          = type_of(argv[4]);
    parameters.flash_attn_type = std::atoi(argv[5]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    parameters.n_threads = parameters.n_threads_batch = 2;
    llama_context * const context                     = llama_init_from_model(model, parameters);
    check(context != nullptr, "making the context");
    check(!std::strcmp(argv[8], "none") || !llama_set_cache_center(context, argv[8]), "the center");
    check(!llama_set_cache_exact(context, std::atoi(argv[6]), 0), "exact rows");

    const int         n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int         split   = std::atoi(argv[7]);
    std::mt19937      rng(7);
    std::FILE * const out   = std::fopen(argv[9], "wb");
    llama_batch       batch = llama_batch_init(N, 0, 1);
    check(out != nullptr, "writing");
    for (int first = 0; first < N; first += split) {
        batch.n_tokens = first + split < N ? split : N - first;
        for (int i = 0; i < batch.n_tokens; i++) {
            batch.token[i]     = rng() % (n_vocab < 200 ? n_vocab : 200);
            batch.pos[i]       = first + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = 1;
        }
        check(!llama_decode(context, batch), "decoding");
        for (int i = 0; i < batch.n_tokens; i++) {
            check(std::fwrite(llama_get_logits_ith(context, i), sizeof(float), n_vocab, out) == (size_t) n_vocab,
                  "writing");
        }
    }
    check(!std::fclose(out), "writing");
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
}
