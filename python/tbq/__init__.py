# SPDX-License-Identifier: MIT
"""tbq: the block formats tbq2_0, tbq3_0 and tbq4_0 for NumPy arrays, and the patched llama.cpp.

    >>> import numpy as np, tbq
    >>> x = np.random.default_rng(0).standard_normal((2, 128), dtype=np.float32)
    >>> packed = tbq.quantize(x, "tbq4_0")
    >>> packed.shape, packed.dtype
    ((2, 68), dtype('uint8'))
    >>> tbq.dequantize(packed, "tbq4_0", x.shape).shape
    (2, 128)

Importing tbq also makes these types known to the package gguf: gguf.GGMLQuantizationType.TBQ4_0, GGUFReader,
GGUFWriter, gguf.quantize.
"""

from tbq._types import BLOCK, TypeInfo, types
from tbq._version import FORMAT_VERSION, __version__
from tbq.blocks import dequantize, quantize, rotate, row_bytes, unrotate
from tbq.errors import TBQError
from tbq.gguf_files.convert import convert
from tbq.gguf_files.reader import open_gguf
from tbq.kv_cache.layers import Layer
from tbq.kv_cache.plan import Pair, Plan, plan
from tbq.programs.paths import paths
from tbq.serving.server import Server

__all__ = [
    "BLOCK",
    "FORMAT_VERSION",
    "Layer",
    "Pair",
    "Plan",
    "Server",
    "TBQError",
    "TypeInfo",
    "__version__",
    "convert",
    "dequantize",
    "open_gguf",
    "paths",
    "plan",
    "quantize",
    "rotate",
    "row_bytes",
    "types",
    "unrotate",
]
