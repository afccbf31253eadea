// SPDX-License-Identifier: MIT
// Attention with NEON and the dot product instructions: the code of NEON, compiled with the flag for them.
#include "neon.c"
