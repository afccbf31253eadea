// SPDX-License-Identifier: MIT
// The Vulkan backend of this build for programs that were built without it ($GGML_BACKEND_PATH).  They have the same
// ggml, so what the backend calls is theirs.
#include "ggml-backend-impl.h"
#include "ggml-vulkan.h"

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    return ggml_backend_vk_reg();
}
