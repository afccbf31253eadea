// SPDX-License-Identifier: MIT
// Attention with NEON and the dot product instructions: the same code, its flags turn them on.
#include "neon.c"
