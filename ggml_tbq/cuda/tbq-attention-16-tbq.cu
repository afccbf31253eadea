// SPDX-License-Identifier: MIT
#include "tbq-attention-launch.cuh"

TBQ_ATTENTION_DEFINE(16, 2)
TBQ_ATTENTION_DEFINE(16, 3)
TBQ_ATTENTION_DEFINE(16, 4)
