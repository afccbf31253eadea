# SPDX-License-Identifier: MIT
"""GGUF files: reading, the types in the package gguf, converting, comparing."""
