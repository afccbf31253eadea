# SPDX-License-Identifier: MIT
"""The KV cache of a model: types and sizes, the choice of types, the means of the keys."""
