# SPDX-License-Identifier: MIT
"""Blocks of any type to float32 and back: ours by libtbq, the others by the ggml that lies beside it, whose bytes are
llama-quantize's; without llama.cpp (-DTBQ_LLAMA=OFF) by gguf, which is slower and cannot encode the K types.

Called from many threads; everything here runs without the GIL.
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
    """A function from whole blocks (one axis of bytes) to their values; TBQError if there is none."""
    name = type.name.lower()
    if name in types:
        return lambda data: blocks.dequantize(data, name, len(data) // types[name].block_bytes * BLOCK)
    if type == GGMLQuantizationType.F32:
        return lambda data: data.view("<f4")
    function = (_fast_half() if type == GGMLQuantizationType.F16 else None) or _symbol(_decoder_name(name))
    if function is None:
        return _probed(lambda data: gguf.dequantize(data, type), type, Bytes, "decode")
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]

    def decode(data: Bytes) -> Floats:
        values = np.empty(len(data) // block_bytes * block, np.float32)
        function(_pointer(data), _pointer(values), ctypes.c_int64(len(values)))
        return values

    return decode


def encoder(type: GGMLQuantizationType) -> Callable[[Floats], Bytes]:
    """A function from the values of whole blocks (one axis) to their bytes; TBQError if there is none."""
    name = type.name.lower()
    if name in types:
        return lambda values: blocks.quantize(values, name)
    if type == GGMLQuantizationType.F32:
        return lambda values: values.view(np.uint8)
    needs_matrix, quantize = _symbol("ggml_quantize_requires_imatrix"), _symbol("ggml_quantize_chunk")
    if needs_matrix is None or quantize is None:
        return _probed(lambda values: gguf.quantize(values, type).view(np.uint8), type, Floats, "encode")
    needs_matrix.restype, quantize.restype = ctypes.c_bool, ctypes.c_size_t
    if _symbol(_decoder_name(name)) is None:
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
    special = {
        "f16": "ggml_fp16_to_fp32_row",
        "bf16": "ggml_bf16_to_fp32_row",
        "q8_k": "",
    }  # q8_k: for activations only
    return special.get(name, f"dequantize_row_{re.sub('_k$', '_K', name)}")


def _pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _symbol(name: str) -> Any:
    """A function of ggml, or None."""
    return getattr(_ggml(), name, None) if name else None


@functools.cache
def _ggml() -> ctypes.CDLL | None:
    return _library("ggml-base")


def _library(name: str) -> ctypes.CDLL | None:
    try:
        found = paths()
    except TBQError:
        return None
    for folder in (found["lib"], found["bin"]):  # on Windows libraries are beside the programs
        for path in sorted(pathlib.Path(folder).glob(f"*{name}.*")):
            if path.suffix in (".so", ".dylib", ".dll"):
                return ctypes.CDLL(str(path))
    return None


def _cpu_backend() -> ctypes.CDLL | None:
    """The library of the CPU backend; of a portable build's many the one that ggml would choose here."""
    found = _library("ggml-cpu")
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
def _fast_half() -> Any:
    """The CPU backend's half to float, ten times as fast as ggml-base's and NumPy's, or None.

    Without the instructions it reads a table that is empty until the backend starts, so all halves are compared.
    """
    function = getattr(_cpu_backend(), "ggml_cpu_fp16_to_fp32", None)
    if function is not None:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        values = np.empty(1 << 16, np.float32)
        function(_pointer(halves), _pointer(values), ctypes.c_int64(1 << 16))
        if not np.array_equal(values, halves.astype(np.float32), equal_nan=True):
            return None
    return function


def _probed(
    function: Callable[[Any], Any], type: GGMLQuantizationType, argument: Any, verb: str
) -> Callable[[Any], Any]:
    """The function, once it has done a block: gguf says only then what it cannot do."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    try:
        function(np.zeros(block_bytes, np.uint8) if argument is Bytes else np.zeros(block, np.float32))
    except (NotImplementedError, KeyError):
        raise TBQError(f"gguf cannot {verb} type {type.name.lower()}") from None
    return function
