// SPDX-License-Identifier: MIT
// Where the library that includes this header lies.  Included by the patched ggml-backend-reg.cpp, which looks there for
// backend modules: they are of the same build as the library, whatever program has loaded it (Python, for example).
#pragma once

#include <filesystem>
#ifndef _WIN32
#    include <dlfcn.h>
#endif

// The folder of the shared library, or of the executable that it was linked into; `fallback` where the system cannot say.
static std::filesystem::path tbq_ggml_library_dir(const std::filesystem::path & fallback) {
#ifndef _WIN32
    Dl_info info;
    if (dladdr((const void *) &tbq_ggml_library_dir, &info) && info.dli_fname) {
        std::error_code error;
        const std::filesystem::path library = std::filesystem::canonical(info.dli_fname, error);
        if (!error) {
            return library.parent_path();
        }
    }
#endif
    return fallback;
}
