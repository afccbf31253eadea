// SPDX-License-Identifier: MIT
// The search with AVX-512 and VNNI: the code of AVX-512, compiled with the flag for fused integer dot products.
#include "avx512.c"
