// SPDX-License-Identifier: MIT
// NEON with the dot product instructions: the same code, its flags turn them on.
#include "neon.c"
