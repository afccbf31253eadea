# SPDX-License-Identifier: MIT
"""When a constant part of the keys is too large for 4 bits.

The planner and the HuggingFace cache share this rule.  This module imports nothing, because the HuggingFace cache also
runs without the C library.
"""

#: From this ratio on, a bias counts as large.  Such a bias in every layer makes 4-bit keys worse than 3-bit keys
#: without it (docs/measurements/quality.md).
LARGE_BIAS = 4.0
