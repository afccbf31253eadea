// SPDX-License-Identifier: MIT
// Attention with AVX-512 and VNNI: the same code, its flags turn on the fused integer dot products.
#include "avx512.c"
