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

common_center_ptr measure(const llama_context * ctx, llama_model * model, const llama_context_params & cparams) {
    COM_INF("%s\n", "measuring the means of the keys, for a more accurate cache (--cache-center none: without) ...");
    return common_center_measure(model, cparams, { llama_cache_center_n_ctx(ctx), /*.n_chunks =*/0, TEXT, {} });
}

// Measures the means and keeps them in a file, if that can be written.
common_center_ptr measure_and_keep(const llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                   const fs::path & file) {
    common_center_ptr center;
    std::string       reason = "the user has no folder for caches";
    if (!file.empty()) {
        try {
            const part_file part(file); // before the keys are measured, which may take long
            center = measure(ctx, model, cparams);
            part.put(center.get());
            COM_INF("the means of the keys were measured once, they are kept in %s\n", fs_path_to_utf8(file).c_str());
            return center;
        } catch (const std::system_error & err) {
            reason = fs_path_to_utf8(file.parent_path()) + " cannot be written: " + err.code().message();
        }
    }
    if (!center) {
        center = measure(ctx, model, cparams);
    }
    COM_INF("the means of the keys are measured at each start: %s\n", reason.c_str());
    return center;
}

// Throws if the keys cannot be centered.
std::shared_ptr<llama_center> set_kept_or_measured(llama_context * ctx, llama_model * model,
                                                   const llama_context_params & cparams, bool own_rope) {
    char key[512];
    if (llama_cache_center_key(ctx, own_rope, key, sizeof(key)) != 0) {
        throw std::runtime_error(key);
    }
    const fs::path  folder = centers_folder();
    const fs::path  file   = folder.empty() ? folder : folder / (std::string(key) + ".gguf");
    std::error_code error;
    if (!file.empty() && fs::is_regular_file(file, error)) {
        common_center_ptr kept{ llama_center_load(fs_path_to_utf8(file).c_str()) };
        if (kept && llama_set_center(ctx, kept.get()) == 0) {
            COM_INF("the means of the keys are those in %s\n", fs_path_to_utf8(file).c_str());
            return kept;
        }
    }
    common_center_ptr measured = measure_and_keep(ctx, model, cparams, file);
    if (llama_set_center(ctx, measured.get()) != 0) {
        throw std::runtime_error("the measured means do not fit, see above");
    }
    return measured;
}

void set_auto(llama_context * ctx, llama_model * model, const llama_context_params & cparams, common_params & params) {
    try {
        if (!params.lora_adapters.empty() || !params.control_vectors.empty()) {
            throw std::runtime_error("adapters and control vectors change them");
        }
        if (!params.cache_center_data) {
            params.cache_center_data = set_kept_or_measured(ctx, model, cparams, has_own_rope(cparams, params));
        } else if (llama_set_center(ctx, params.cache_center_data.get()) != 0) { // of a server that wakes up
            throw std::runtime_error("the means do not fit any more, see above");
        }
    } catch (const std::exception & err) {
        COM_WRN("the keys are not centered: %s\n", err.what());
    }
}

} // namespace

llama_context * common_set_center(llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                  common_params & params) {
    if (!ctx || params.cache_center.empty() || params.cache_center == "none") {
        return ctx;
    }
    if (params.cache_center == "auto") {
        if (ggml_is_quantized(cparams.type_k) && !params.no_alloc) {
            set_auto(ctx, model, cparams, params);
        }
        return ctx;
    }
    if (!params.cache_center_data) {
        // once: when a server wakes up the file may have changed, or be gone
        params.cache_center_data.reset(llama_center_load(params.cache_center.c_str()), llama_center_free);
    }
    if (!params.cache_center_data || llama_set_center(ctx, params.cache_center_data.get()) != 0) {
        llama_free(ctx);
        return nullptr;
    }
    return ctx;
}
