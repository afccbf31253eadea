# SPDX-License-Identifier: MIT
"""When a constant part of the keys is too large for 4 bits: one rule for the planner and the HuggingFace cache, which needs no library for it."""

#: From here on key_biases() finds a bias large: in every layer it costs 4-bit keys more than one of their bits (docs/plan.md).
LARGE_BIAS = 4.0
