// SPDX-License-Identifier: MIT
// llama-cache-center: measure the mean of a model's keys and write it into a small GGUF file.
//
//     llama-cache-center -m model.gguf -f text.txt -c 8192 -o model.center.gguf

#include "common-center-measure.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

namespace {

void print_usage(int, char ** argv) {
    LOG("\nexample usage:\n\n    %s -m model.gguf -f text.txt -c 8192 -o model.center.gguf [--chunks 8] [-ngl 99]\n\n",
        argv[0]);
}

// NULL, and the reason is in the log, for a model that cannot be measured.
llama_model_ptr load_model(common_params & params) {
    llama_model_ptr model{ llama_model_load_from_file(params.model.path.c_str(),
                                                      common_model_params_to_llama(params)) };
    if (!model) {
        LOG_ERR("error: %s cannot be loaded\n", params.model.path.c_str());
        return nullptr;
    }
    if (llama_model_has_encoder(model.get())) {
        LOG_ERR("error: models with an encoder are not for this program\n");
        return nullptr;
    }
    return model;
}

// Loads the adapters for the model.  False, and the reason is in the log, if one cannot be loaded.
bool load_adapters(common_params & params, llama_model * model, std::vector<llama_adapter_lora_ptr> & adapters) {
    for (common_adapter_lora_info & info : params.lora_adapters) {
        adapters.emplace_back(llama_adapter_lora_init(model, info.path.c_str()));
        info.ptr = adapters.back().get();
        if (!info.ptr) {
            LOG_ERR("error: adapter %s cannot be loaded\n", info.path.c_str());
            return false;
        }
    }
    return true;
}

// Of each layer, by the tokens of context that the keys are taken over.
using shares_table = std::vector<std::pair<uint32_t, std::vector<float>>>;

// After an eighth, a quarter, half and all of the chunks.
bool is_reported(uint32_t n_done, uint32_t n_chunks) {
    const uint32_t eighths = 8 * n_done / n_chunks;
    return n_done == n_chunks || ((8 * n_done) % n_chunks == 0 && (eighths == 1 || eighths == 2 || eighths == 4));
}

std::vector<float> shares_of(const llama_cache_center_stats * stats, const llama_model * model) {
    std::vector<float> res;
    for (int32_t il = 0; il < llama_model_n_layer(model); ++il) {
        res.push_back(llama_cache_center_stats_share(stats, il));
    }
    return res;
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
    if (params.out_file.empty() || params.prompt.empty()) {
        LOG_ERR("error: a text (-f) and a file to write (-o) are needed\n");
        return 1;
    }
    params.fit_params                         = false;
    const llama_model_ptr               model = load_model(params);
    std::vector<llama_adapter_lora_ptr> adapters;
    if (!model || !load_adapters(params, model.get(), adapters)) {
        return 1;
    }
    shares_table      shares;
    common_center_job job = { (uint32_t) params.n_ctx, (uint32_t) std::max(params.n_chunks, 0), params.prompt, {}, {} };
    job.on_context        = [&](llama_context * ctx) { common_center_set_adapters(ctx, params); };
    job.on_chunk = [&](const llama_cache_center_stats * stats, uint32_t n_done, uint32_t n_chunks, uint32_t n_ctx) {
        LOG("chunk %u/%u\n", n_done, n_chunks); // tbq calibrate reads these
        if (is_reported(n_done, n_chunks)) {
            shares.emplace_back(n_ctx, shares_of(stats, model.get()));
        }
    };
    common_center_ptr center;
    try {
        center = common_center_measure(model.get(), common_context_params_to_llama(params), job);
    } catch (const std::exception & err) {
        LOG_ERR("error: %s\n", err.what());
        return 1;
    }
    print(shares);
    if (llama_center_save(center.get(), params.out_file.c_str()) != 0) {
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
