// SPDX-License-Identifier: MIT
// --cache-center in the programs of llama.cpp; included by the patched common.cpp.
#pragma once

#include "common.h"

// The context (cparams) of the model with the means that the parameters ask for.  A file that does not fit it: NULL,
// with the context freed (see the log).  With "auto" the context is always returned, centered or not; a line says which.
llama_context * common_set_center(llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                  common_params & params);

// The same for the context of a draft model, with --cache-center-draft.  params: of the draft model.
llama_context * common_set_center_draft(llama_context * ctx, llama_model * model, const llama_context_params & cparams,
                                        common_params & params);
