# SPDX-License-Identifier: MIT
"""llama.cpp's programs: their paths, options, processes and output."""
