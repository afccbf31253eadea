// SPDX-License-Identifier: MIT
#include "tbq-attention-launch.cuh"

TBQ_ATTENTION_DEFINE(4, 2)
