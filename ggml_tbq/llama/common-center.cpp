// SPDX-License-Identifier: MIT
#include "common-center.h"

#include "common-center-measure.h"

#include "log.h"

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>

namespace fs = std::filesystem;

namespace {

const char * const TEXT =
#include "center-text.inc"
    ;

// Where the means of models are kept: the folder that Python's centers_folder() names.  Empty if the user has none.
fs::path centers_folder() {
#if defined(_WIN32)
    const fs::path folder = common_get_path_from_env("LOCALAPPDATA") / "ggml-tbq" / "Cache" / "centers";
#elif defined(__APPLE__)
    const fs::path folder = common_get_path_from_env("HOME") / "Library" / "Caches" / "ggml-tbq" / "centers";
#else
    const fs::path cache  = common_get_path_from_env("XDG_CACHE_HOME");
    const fs::path home   = common_get_path_from_env("HOME");
    const fs::path folder = (cache.empty() ? home / ".cache" : cache) / "ggml-tbq" / "centers";
#endif
    return folder.is_absolute() ? folder : fs::path();
}

// Whether no option changes RoPE from what the model's file says.
bool has_own_rope(const llama_context_params & cparams, const common_params & params) {
    const llama_context_params own = llama_context_default_params();
    return cparams.rope_scaling_type == own.rope_scaling_type && cparams.rope_freq_base == own.rope_freq_base &&
           cparams.rope_freq_scale == own.rope_freq_scale && cparams.yarn_ext_factor == own.yarn_ext_factor &&
           cparams.yarn_attn_factor == own.yarn_attn_factor && cparams.yarn_beta_fast == own.yarn_beta_fast &&
           cparams.yarn_beta_slow == own.yarn_beta_slow && cparams.yarn_orig_ctx == own.yarn_orig_ctx &&
           params.kv_overrides.empty();
}

// A new file beside the one with kept means, which takes its place when it is complete.  Each program has one of its
// own, so that those that start at once do not disturb each other.
class part_file {
public:
    explicit part_file(const fs::path & target) : target(target), path(target) {
        fs::create_directories(target.parent_path());
        std::random_device random;
        path += string_format(".%08x%08x.part", (unsigned) random(), (unsigned) random());
        errno = 0;
        if (!std::ofstream(path, std::ios::binary)) {
            throw std::system_error(errno, std::generic_category());
        }
    }
    ~part_file() {
        std::error_code error;
        fs::remove(path, error);
    }
    part_file(const part_file &)             = delete;
    part_file & operator=(const part_file &) = delete;

    void put(const llama_center * center) const {
        if (llama_center_save(center, fs_path_to_utf8(path).c_str()) != 0) {
            throw std::system_error(std::make_error_code(std::errc::io_error));
        }
        fs::rename(path, target);
    }

private:
    fs::path target;
    fs::path path;
};

// What is centered, and how.
struct request {
    llama_context *              ctx;
    llama_model *                model;
    const llama_context_params & cparams;
    common_params &              params;
    bool                         draft;

    std::string choice() const { // "auto", "none" or a file
        if (!draft) {
            return params.cache_center;
        }
        const std::string & own = params.speculative.draft.cache_center;
        return !own.empty() ? own : params.cache_center == "none" ? "none" : "auto";
    }

    // Adapters and control vectors are those of the main model.
    void set_adapters(llama_context * to) const {
        if (!draft) {
            common_center_set_adapters(to, params);
        }
    }
};

common_center_ptr measure(const request & req) {
    COM_INF("measuring the means of the keys%s, for a more accurate cache (--cache-center%s none: without) ...\n",
            req.draft ? " of the draft model" : "", req.draft ? "-draft" : "");
    common_center_job job = { llama_cache_center_n_ctx(req.ctx), /*.n_chunks =*/0, TEXT, {}, {} };
    job.on_context        = [&](llama_context * ctx) { req.set_adapters(ctx); };
    return common_center_measure(req.model, req.cparams, job);
}

// Measures the means and keeps them in a file, if that can be written.
common_center_ptr measure_and_keep(const request & req, const fs::path & file) {
    common_center_ptr center;
    std::string       reason = "the user has no folder for caches";
    if (!file.empty()) {
        try {
            const part_file part(file); // before the keys are measured, which may take long
            center = measure(req);
            part.put(center.get());
            COM_INF("the means of the keys were measured once, they are kept in %s\n", fs_path_to_utf8(file).c_str());
            return center;
        } catch (const std::system_error & err) {
            reason = fs_path_to_utf8(file.parent_path()) + " cannot be written: " + err.code().message();
        }
    }
    if (!center) {
        center = measure(req);
    }
    COM_INF("the means of the keys are measured at each start: %s\n", reason.c_str());
    return center;
}

// Throws if the keys cannot be centered.
std::shared_ptr<llama_center> set_kept_or_measured(const request & req) {
    char key[512];
    if (llama_cache_center_key(req.ctx, has_own_rope(req.cparams, req.params), key, sizeof(key)) != 0) {
        throw std::runtime_error(key);
    }
    const fs::path  folder = centers_folder();
    const fs::path  file   = folder.empty() ? folder : folder / (std::string(key) + ".gguf");
    std::error_code error;
    if (!file.empty() && fs::is_regular_file(file, error)) {
        common_center_ptr kept{ llama_center_load(fs_path_to_utf8(file).c_str()) };
        if (kept && llama_set_center(req.ctx, kept.get()) == 0) {
            COM_INF("the means of the keys are those in %s\n", fs_path_to_utf8(file).c_str());
            return kept;
        }
    }
    common_center_ptr measured = measure_and_keep(req, file);
    if (llama_set_center(req.ctx, measured.get()) != 0) {
        throw std::runtime_error("the measured means do not fit, see above");
    }
    return measured;
}

void set_auto(const request & req, std::shared_ptr<llama_center> & data) {
    try {
        req.set_adapters(req.ctx);
        if (!data) {
            data = set_kept_or_measured(req);
        } else if (llama_set_center(req.ctx, data.get()) != 0) { // of a server that wakes up
            throw std::runtime_error("the means do not fit any more, see above");
        }
    } catch (const std::exception & err) {
        COM_WRN("the keys%s are not centered: %s\n", req.draft ? " of the draft model" : "", err.what());
    }
}

// False if a file does not fit.
bool set_file(const request & req, const std::string & path, std::shared_ptr<llama_center> & data) {
    if (!data) {
        // once for the main model: when a server wakes up the file may have changed, or be gone
        data.reset(llama_center_load(path.c_str()), llama_center_free);
    }
    try {
        req.set_adapters(req.ctx);
    } catch (const std::exception & err) {
        COM_ERR("%s\n", err.what());
        return false;
    }
    return data && llama_set_center(req.ctx, data.get()) == 0;
}

llama_context * set_center(const request & req, std::shared_ptr<llama_center> & data) {
    const std::string choice = req.choice();
    if (!req.ctx || choice.empty() || choice == "none") {
        return req.ctx;
    }
    if (choice == "auto") {
        if (ggml_is_quantized(req.cparams.type_k) && !req.params.no_alloc) {
            set_auto(req, data);
        }
        return req.ctx;
    }
    if (!set_file(req, choice, data)) {
        llama_free(req.ctx);
        return nullptr;
    }
    return req.ctx;
}

} // namespace

llama_context * common_set_center(llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                  common_params & params) {
    return set_center({ ctx, model, cparams, params, /*.draft =*/false }, params.cache_center_data);
}

llama_context * common_set_center_draft(llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                        common_params & params) {
    std::shared_ptr<llama_center> data; // params has that of the main model
    return set_center({ ctx, model, cparams, params, /*.draft =*/true }, data);
}
