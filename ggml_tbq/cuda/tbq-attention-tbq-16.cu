// SPDX-License-Identifier: MIT
#include "tbq-attention-launch.cuh"

TBQ_ATTENTION_DEFINE(2, 16)
TBQ_ATTENTION_DEFINE(3, 16)
TBQ_ATTENTION_DEFINE(4, 16)
