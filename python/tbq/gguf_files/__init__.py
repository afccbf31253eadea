# SPDX-License-Identifier: MIT
"""GGUF files: the reader, the tbq types in the package gguf, conversion, inspection."""
