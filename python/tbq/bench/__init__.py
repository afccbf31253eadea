# SPDX-License-Identifier: MIT
"""Measurements: speed and quality of cache types, and the vector index compared with others."""
