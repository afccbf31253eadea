// SPDX-License-Identifier: MIT
// See Python.h beside this file.
