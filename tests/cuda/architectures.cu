// SPDX-License-Identifier: MIT
// One of each kernel.  test_cuda.py compiles this for every architecture, and nothing runs it.
#include "tbq-attention-heads.cuh"
#include "tbq-attention-rows.cuh"
#include "tbq-attention.cuh"
#include "tbq-dequantize.cuh"
#include "tbq-matvec.cuh"
#include "tbq-prompt.cuh"
#include "tbq-quantize.cuh"

template __global__ void tbq_attention<128, 4, 4, 8, false>(const tbq_attention_args);
template __global__ void tbq_attention<128, 3, 2, 16, false>(const tbq_attention_args);
template __global__ void tbq_attention<64, 2, 3, 8, false>(const tbq_attention_args);
template __global__ void tbq_attention<128, 8, 4, 8, false>(const tbq_attention_args);
template __global__ void tbq_attention<128, 4, 16, 8, false>(const tbq_attention_args);
template __global__ void tbq_attention<128, 4, 4, 8, true>(const tbq_attention_args);
template __global__ void tbq_attention<128, 8, 4, 8, true>(const tbq_attention_args);
template __global__ void tbq_attention_combine<128, 4, true>(const tbq_attention_args);
template __global__ void tbq_attention_rows<128, 4, 4, 8, 8, true>(const tbq_attention_args);
template __global__ void tbq_attention_rows_combine<128>(const tbq_attention_args);
template __global__ void tbq_attention_heads<192, 128, 8>(const tbq_heads_args);
template __global__ void tbq_attention_heads<512, 512, 16>(const tbq_heads_args);
template __global__ void tbq_attention_heads<576, 512, 64>(const tbq_heads_args);
template __global__ void tbq_heads_prepare<576, 512, 64>(const tbq_heads_args);
template __global__ void tbq_heads_combine<576, 512>(const tbq_heads_args);
template __global__ void tbq_dequantize_rows<4, half>(const tbq_decode_args);
template __global__ void tbq_dequantize_exact_rows<half>(const tbq_decode_args, const int *, long long);
template __global__ void tbq_matvec<4, 1>(const tbq_matvec_args);
template __global__ void tbq_quantize_rows<4, float>(const tbq_encode_args);
template __global__ void tbq_quantize_pair<4, 3, true>(const __grid_constant__ tbq_pair_args);
// code for sm_90a, and nothing for the others
template __global__ void tbq_prompt_map<128>(const __grid_constant__ tbq_prompt_args);
template __global__ void tbq_prompt<64, TBQ_PROMPT_LAUNCH>(const __grid_constant__ tbq_prompt_args);
template __global__ void tbq_prompt<128, TBQ_PROMPT_LAUNCH>(const __grid_constant__ tbq_prompt_args);
template __global__ void tbq_prompt<256, TBQ_PROMPT_LAUNCH>(const __grid_constant__ tbq_prompt_args);
