// SPDX-License-Identifier: MIT
// The search with NEON and the dot product instructions: the code of NEON, compiled with the flag for them.
#include "neon.c"
