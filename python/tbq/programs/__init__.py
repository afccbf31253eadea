# SPDX-License-Identifier: MIT
"""llama.cpp's programs: where they are, what they take, how they run, what they print."""
