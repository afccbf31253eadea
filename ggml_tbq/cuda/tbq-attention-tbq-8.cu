// SPDX-License-Identifier: MIT
#include "tbq-attention-launch.cuh"

TBQ_ATTENTION_DEFINE(2, 8)
TBQ_ATTENTION_DEFINE(3, 8)
TBQ_ATTENTION_DEFINE(4, 8)
