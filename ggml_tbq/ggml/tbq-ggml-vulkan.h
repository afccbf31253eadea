// SPDX-License-Identifier: MIT
// The operations of the Vulkan backend on the tbq types; compiled into ggml-vulkan.  The patched backend calls these
// functions first.  False, with nothing done, leaves the operation to the backend.
#pragma once

#include "ggml-vulkan-common.h"

// Whether this is an operation on a tbq type that the device can compute: SET_ROWS (f32 or f16, int32 or int64 row
// numbers; exact rows too), CPY between f32 and blocks of one shape and from f16, GET_ROWS, CONCAT of exact rows
// (tbq_ggml_concat_exact), MUL_MAT, MUL_MAT_ID and FLASH_ATTN_EXT.
bool tbq_vk_supports_op(ggml_backend_dev_t dev, const vk_device & device, const ggml_tensor * op);

// Whether nodes i to i + 2 are a rotary embedding (modes NORMAL and NEOX), a view of it, and the SET_ROWS that stores it
// in a tbq type, which are recorded as one.
bool tbq_vk_can_fuse(const ggml_cgraph * graph, int i);

// Records such an operation, node i of the graph, with the nodes that are fused with it.
bool tbq_vk_compute(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_cgraph * graph, int i);

// Whether `later` must stay behind `earlier` because of exact rows, which a SET_ROWS writes although they are a source.
bool tbq_vk_depends(const ggml_tensor * later, const ggml_tensor * earlier);

// Of the backend itself.
void ggml_vk_create_pipeline_func(vk_device & device, vk_pipeline & pipeline, size_t spv_size, const void * spv_data,
                                  const std::string entrypoint, uint32_t parameter_count,
                                  std::array<uint32_t, 3> wg_denoms, std::vector<uint32_t> specialization_constants,
                                  bool disable_robustness, bool require_full_subgroups,
                                  uint32_t required_subgroup_size);
