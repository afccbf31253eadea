# SPDX-License-Identifier: MIT
"""Decodes blocks of any type to float32, and encodes them.

libtbq converts the tbq types.  The ggml of this package converts the others, so they get llama-quantize's bytes.
A build without llama.cpp (-DTBQ_LLAMA=OFF) uses the package gguf, which is slower and cannot encode the K types.

Many threads call these functions; all of them run without the GIL.
"""

import ctypes
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tbq import blocks
from tbq._types import BLOCK, types
from tbq.errors import TBQError
from tbq.programs.paths import paths

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def decoder(type: GGMLQuantizationType) -> Callable[[Bytes], Floats]:
    """Returns a function from whole blocks (one axis of bytes) to their values.  Raises TBQError if there is none."""
    name = type.name.lower()
    if name in types:
        return lambda data: blocks.dequantize(data, name, len(data) // types[name].block_bytes * BLOCK)
    if type == GGMLQuantizationType.F32:
        return lambda data: data.view("<f4")
    function = (_fast_f16_decoder() if type == GGMLQuantizationType.F16 else None) or _ggml_function(
        _decoder_name(name)
    )
    if function is None:
        return _try_out(lambda data: gguf.dequantize(data, type), type, Bytes, "decode")
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]

    def decode(data: Bytes) -> Floats:
        values = np.empty(len(data) // block_bytes * block, np.float32)
        function(_pointer(data), _pointer(values), ctypes.c_int64(len(values)))
        return values

    return decode


def encoder(type: GGMLQuantizationType) -> Callable[[Floats], Bytes]:
    """Returns a function from values of whole blocks (one axis) to their bytes.  Raises TBQError if there is none."""
    name = type.name.lower()
    if name in types:
        return lambda values: blocks.quantize(values, name)
    if type == GGMLQuantizationType.F32:
        return lambda values: values.view(np.uint8)
    needs_matrix, quantize = _ggml_function("ggml_quantize_requires_imatrix"), _ggml_function("ggml_quantize_chunk")
    if needs_matrix is None or quantize is None:
        return _try_out(lambda values: gguf.quantize(values, type).view(np.uint8), type, Floats, "encode")
    needs_matrix.restype, quantize.restype = ctypes.c_bool, ctypes.c_size_t
    if _ggml_function(_decoder_name(name)) is None:
        raise TBQError(f"type {name} is not one that weights can have")
    if needs_matrix(int(type)):
        raise TBQError(f"type {name} needs an importance matrix; llama-quantize takes one")
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]

    def encode(values: Floats) -> Bytes:
        n = len(values)
        data = np.empty(n // block * block_bytes, np.uint8)
        # type, source, target, first value, rows, values per row, no importance matrix
        size = quantize(
            int(type), _pointer(values), _pointer(data), ctypes.c_int64(0), ctypes.c_int64(1), ctypes.c_int64(n), None
        )
        if size != len(data):
            raise TBQError(f"ggml wrote {size} bytes of {name} instead of {len(data)}")
        return data

    return encode


def _decoder_name(name: str) -> str:
    # q8_k is for activations only
    special = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row", "q8_k": ""}
    return special.get(name, f"dequantize_row_{re.sub('_k$', '_K', name)}")


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _ggml_function(name: str) -> Any:
    """Returns a function of ggml, or None if ggml does not have it."""
    return getattr(_load_ggml(), name, None) if name else None


@functools.cache
def _load_ggml() -> ctypes.CDLL | None:
    return _load_library("ggml-base")


def _load_library(name: str) -> ctypes.CDLL | None:
    try:
        found = paths()
    except TBQError:
        return None
    for folder in (found["lib"], found["bin"]):  # on Windows the libraries are in the folder of the programs
        for path in sorted(pathlib.Path(folder).glob(f"*{name}.*")):
            if path.suffix in (".so", ".dylib", ".dll"):
                return ctypes.CDLL(str(path))
    return None


def _load_cpu_backend() -> ctypes.CDLL | None:
    """Returns the library of the CPU backend.  A portable build has several: the one that ggml would choose here."""
    found = _load_library("ggml-cpu")
    if found is not None:
        return found
    try:
        modules = [ctypes.CDLL(str(path)) for path in sorted(pathlib.Path(paths()["lib"]).glob("libggml-cpu-*.so"))]
    except (TBQError, OSError):
        return None
    # 0: the machine lacks what the module was compiled for
    return max(
        (module for module in modules if module.ggml_backend_score()),
        key=lambda module: int(module.ggml_backend_score()),
        default=None,
    )


@functools.cache
def _fast_f16_decoder() -> Any:
    """Returns the CPU backend's function from f16 to float, or None.  It is ten times as fast as ggml-base and NumPy.

    On a CPU without instructions for f16 the function reads a table, which is empty until the backend starts.
    So the results for all f16 values are checked here.
    """
    function = getattr(_load_cpu_backend(), "ggml_cpu_fp16_to_fp32", None)
    if function is not None:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        values = np.empty(1 << 16, np.float32)
        function(_pointer(halves), _pointer(values), ctypes.c_int64(1 << 16))
        if not np.array_equal(values, halves.astype(np.float32), equal_nan=True):
            return None
    return function


def _try_out(
    function: Callable[[Any], Any], type: GGMLQuantizationType, argument: Any, verb: str
) -> Callable[[Any], Any]:
    """Returns the function after a trial with one block: only then does gguf say that it cannot convert a type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    try:
        function(np.zeros(block_bytes, np.uint8) if argument is Bytes else np.zeros(block, np.float32))
    except (NotImplementedError, KeyError):
        raise TBQError(f"gguf cannot {verb} type {type.name.lower()}") from None
    return function
