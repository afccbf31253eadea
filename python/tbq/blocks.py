# SPDX-License-Identifier: MIT
"""Encodes NumPy arrays as blocks and decodes them.  The C library computes, and the GIL is released meanwhile."""

import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq._ffi import ffi, lib
from tbq._types import BLOCK, find
from tbq.errors import TBQError

if TYPE_CHECKING:
    from tbq._ffi import CData

#: The arguments of dequantize: the bytes of blocks, and the shape of the result.
Blocks = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Shape = SupportsIndex | Iterable[SupportsIndex]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


def row_bytes(n: SupportsIndex, type: str) -> int:
    """Bytes that n values take in a type.

    n: int, a multiple of 64.  type: name of a type ("tbq4_0").
    Raises TBQError for another n or type.
    """
    info = find(type)
    return _length(n, "n") // BLOCK * info.block_bytes


def quantize(array: npt.ArrayLike, type: str, *, kv: bool = False) -> npt.NDArray[np.uint8]:
    """Blocks of an array, row by row along its last axis.

    array: float32 or float16 of shape (..., n) with n a multiple of 64.  It is read in place if it is C-contiguous,
    and copied otherwise.  type: "tbq2_0", "tbq3_0" or "tbq4_0".
    kv: False encodes for the least squared error.  True encodes as llama.cpp's KV cache does, which keeps
    large channels more exact.  Both give the same format.
    Returns uint8 of shape (..., row_bytes(n, type)).
    A block with a NaN or an infinity decodes to NaNs; its neighbors are not affected.
    Raises TBQError for another dtype, last axis or type.
    """
    info = find(type)
    array = np.asarray(array)
    _check_float(array.dtype, "array has dtype")
    width = _width(array)
    array = np.ascontiguousarray(array)
    packed = np.empty((*array.shape[:-1], width // BLOCK * info.block_bytes), np.uint8)
    if array.dtype == np.float32:
        encode, source = lib.tbq_quantize_kv if kv else lib.tbq_quantize, _pointer("float[]", array)
    else:
        encode, source = lib.tbq_quantize_kv_f16 if kv else lib.tbq_quantize_f16, _pointer("uint16_t[]", array)
    _check_status(encode(info.id, source, _pointer("char[]", packed), array.size))
    return packed


def dequantize(data: Blocks, type: str, shape: Shape, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The values of blocks.

    data: the blocks of the rows, one after the other: bytes-like or a uint8 array, read in place if it is contiguous.
    type: "tbq2_0", "tbq3_0" or "tbq4_0".  shape: shape of the result; its last axis is a multiple of 64.
    dtype: float32, or float16 (rounded to nearest even).
    Returns an array of that shape and dtype.
    Raises TBQError for another dtype, shape, number of bytes or type.
    """
    info = find(type)
    dtype = np.dtype(dtype)
    _check_float(dtype, "dtype is")
    shape = _shape(shape)
    packed = _bytes_of(data)
    values = math.prod(shape)
    expected = values // BLOCK * info.block_bytes
    if packed.size != expected:
        raise TBQError(f"data has {packed.size} bytes; {info.name} of shape {shape} has {expected}")
    result = np.empty(shape, dtype)
    if dtype == np.float32:
        status = lib.tbq_dequantize(info.id, _pointer("char[]", packed), _pointer("float[]", result), values)
    else:
        status = lib.tbq_dequantize_f16(info.id, _pointer("char[]", packed), _pointer("uint16_t[]", result), values)
    _check_status(status)
    return result


def rotate(array: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The values that quantize rounds: each 64 values, turned by the fixed rotation of the types.

    The rotation keeps lengths and angles.

    array: float32 of shape (..., n) with n a multiple of 64.  Returns float32 of the same shape.
    Raises TBQError for another dtype or last axis.
    """
    return _transform(lib.tbq_rotate, array)


def unrotate(array: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The inverse of rotate, up to rounding, with the same shapes, dtypes and errors."""
    return _transform(lib.tbq_unrotate, array)


def _transform(function: "Callable[[CData, CData, int], int]", values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    array = np.asarray(values)
    if array.dtype != np.float32:
        raise TBQError(f"array has dtype {array.dtype}; it must be float32")
    _width(array)
    array = np.ascontiguousarray(array)
    result = np.empty(array.shape, np.float32)
    _check_status(function(_pointer("float[]", array), _pointer("float[]", result), array.size))
    return result


def _check_float(dtype: np.dtype[Any], what: str) -> None:
    # equality of dtypes includes the byte order
    if dtype not in _FLOATS:
        raise TBQError(f"{what} {dtype}; it must be float32 or float16")


def _width(array: npt.NDArray[Any]) -> int:
    if array.ndim == 0:
        raise TBQError("array has no axis; its last axis must be a multiple of 64")
    return _length(array.shape[-1], f"array has shape {array.shape}: its last axis")


def _length(length: SupportsIndex, what: str) -> int:
    try:
        n = operator.index(length)
    except TypeError:
        raise TBQError(f"{what} is {length!r}; it must be a multiple of {BLOCK}") from None
    if n < 0 or n % BLOCK:
        raise TBQError(f"{what} is {n}; it must be a multiple of {BLOCK}")
    return n


def _shape(shape: Shape) -> tuple[int, ...]:
    try:
        axes = tuple(operator.index(n) for n in (shape if isinstance(shape, Iterable) else (shape,)))
    except TypeError:
        raise TBQError(f"shape is {shape!r}; it must be a tuple of integers") from None
    if not axes or min(axes) < 0:
        raise TBQError(f"shape is {axes}; it must have at least one axis and none below 0")
    _length(axes[-1], f"shape is {axes}: its last axis")
    return axes


def _bytes_of(data: Blocks) -> npt.NDArray[np.uint8]:
    """The data as one axis of uint8; a view of it where that is possible."""
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8:
            raise TBQError(f"data has dtype {data.dtype}; it must be uint8")
        return np.ascontiguousarray(data).reshape(-1)
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise TBQError(f"data is a {data.__class__.__name__}; it must be bytes-like or a uint8 array") from None


def _pointer(ctype: str, array: npt.NDArray[Any]) -> "CData":
    # from_buffer takes read-only memory only if it is not asked to write; the library writes to results only
    return ffi.from_buffer(ctype, array.reshape(-1).view(np.uint8) if array.size else b"")


def _check_status(status: int) -> None:
    if status != lib.TBQ_OK:
        raise TBQError(ffi.string(lib.tbq_status_text(status)).decode())
