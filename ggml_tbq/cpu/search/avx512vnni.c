// SPDX-License-Identifier: MIT
// AVX-512 with VNNI: the same code, its flags turn on the fused integer dot products.
#include "avx512.c"
