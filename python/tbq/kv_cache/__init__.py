# SPDX-License-Identifier: MIT
"""What a KV cache is: its types and their sizes, what suits a model, the means of its keys."""
