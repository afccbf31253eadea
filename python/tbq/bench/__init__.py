# SPDX-License-Identifier: MIT
"""Measurements: cache types side by side in speed and quality, the index next to others."""
