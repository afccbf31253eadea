# SPDX-License-Identifier: MIT
"""Packs indices of 1 to 8 bits, without gaps."""

from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.turboquant._checks import Bytes, check_integer

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(count: SupportsIndex, bits: SupportsIndex) -> int:
    """Returns the bytes of `count` packed indices: count * bits, rounded up to bytes.

    count: 0 or more.  bits: 1 to 8.  Raises TBQError for other values.
    """
    return (check_integer(count, "count", 0) * check_integer(bits, "bits", 1, 8) + 7) // 8


def pack(indices: npt.ArrayLike, bits: SupportsIndex) -> Bytes:
    """Packs the indices along the last axis into bytes.

    Bit j of index i is bit i * bits + j of its row, and bit k of a row is bit k % 8 of byte k // 8.  Unused bits of the
    last byte are 0.
    indices: integers from 0 to 2**bits - 1, of shape (..., n).  bits: 1 to 8.
    Returns uint8 of shape (..., packed_bytes(n, bits)).
    Raises TBQError for another dtype, an index out of range, no axis or bits out of range.
    """
    width = check_integer(bits, "bits", 1, 8)
    array = _integers(indices)
    if array.size and not (0 <= array.min() and array.max() < 2**width):
        raise TBQError(f"indices reach from {array.min()} to {array.max()}; {width} bits hold 0 to {2**width - 1}")
    return pack_unchecked(array.astype(np.uint8, copy=False), width)


def pack_unchecked(indices: Bytes, bits: int) -> Bytes:
    """pack() without checks."""
    exploded = np.unpackbits(indices[..., None], axis=-1, count=bits, bitorder="little")
    packed: Bytes = np.packbits(
        exploded.reshape(*indices.shape[:-1], indices.shape[-1] * bits), axis=-1, bitorder="little"
    )
    return packed


def unpack(packed: npt.ArrayLike, bits: SupportsIndex, count: SupportsIndex) -> Bytes:
    """The inverse of pack.

    packed: uint8 of shape (..., packed_bytes(count, bits)).  bits: 1 to 8.  count: indices in a row.
    Returns uint8 of shape (..., count).
    Raises TBQError for another dtype or last axis, and for bits or count out of range.
    """
    width, n = check_integer(bits, "bits", 1, 8), check_integer(count, "count", 0)
    array = np.asarray(packed)
    if array.dtype != np.uint8 or array.ndim == 0:
        raise TBQError(
            f"packed has dtype {array.dtype} and {array.ndim} axes; it must be uint8 and have at least one axis"
        )
    if array.shape[-1] != packed_bytes(n, width):
        raise TBQError(
            f"packed has shape {array.shape}; {n} indices of {width} bits take {packed_bytes(n, width)} bytes"
        )
    exploded = np.unpackbits(array, axis=-1, count=n * width, bitorder="little")
    return np.packbits(exploded.reshape(*array.shape[:-1], n, width), axis=-1, bitorder="little")[..., 0]


def _integers(values: npt.ArrayLike) -> npt.NDArray[np.integer[Any]]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim == 0:
        raise TBQError(
            f"indices have dtype {array.dtype} and {array.ndim} axes; they must be integers and have at least one axis"
        )
    return array
