// SPDX-License-Identifier: MIT
#include "tbq-attention-launch.cuh"

TBQ_ATTENTION_DEFINE(8, 2)
TBQ_ATTENTION_DEFINE(8, 3)
TBQ_ATTENTION_DEFINE(8, 4)
