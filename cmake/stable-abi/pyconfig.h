// SPDX-License-Identifier: MIT
// See Python.h in this folder.
