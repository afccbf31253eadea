# SPDX-License-Identifier: MIT
"""What the functions of this package accept, and numbers drawn from a seed."""

import operator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError

#: float32 or float64; a result has the dtype of what went in.
Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_CHUNK = 1 << 21  # values at a time: the rows in between are several times as large as the packed result


def integer(value: SupportsIndex, name: str, low: int, high: int | None = None) -> int:
    """value as an int; TBQError unless low <= value <= high."""
    rule = f"of {low} to {high}" if high is not None else f"of at least {low}"
    try:
        n = operator.index(value)
    except TypeError:
        raise TBQError(f"{name} is {value!r}; it must be an integer {rule}") from None
    if n < low or high is not None and n > high:
        raise TBQError(f"{name} is {n}; it must be an integer {rule}")
    return n


def floats(values: npt.ArrayLike, name: str) -> Floats:
    """values as an array, C-contiguous; TBQError unless it is of float32 or float64, has an axis and values, all finite."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise TBQError(f"{name} is not an array of numbers; its rows must have one length") from None
    if array.dtype not in _FLOATS:  # equality of dtypes includes the byte order
        raise TBQError(f"{name} has dtype {array.dtype}; it must be float32 or float64")
    if array.ndim == 0:
        raise TBQError(f"{name} has no axis; vectors lie along its last axis")
    if array.size == 0:
        raise TBQError(f"{name} has shape {array.shape}; no axis may be empty")
    finite = np.isfinite(array)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
        raise TBQError(f"{name} has {array[index]} at {index}; every value must be finite")
    return np.ascontiguousarray(array)


def vectors(values: npt.ArrayLike, dim: int, name: str = "x") -> Floats:
    """floats() with a last axis of dim."""
    array = floats(values, name)
    if array.shape[-1] != dim:
        raise TBQError(f"{name} has shape {array.shape}; its last axis must be {dim}")
    return array


def lengths(values: object, name: str) -> Floats:
    """What a code keeps beside the bits; TBQError unless it is an array of float32 or float64, finite and not negative."""
    if not isinstance(values, np.ndarray) or values.dtype not in _FLOATS:
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TBQError(f"{name} is {found}; it must be an array of float32 or float64")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise TBQError(f"{name} has a value that is negative or not finite; they are lengths of vectors")
    return values


def split(array: Floats) -> tuple[Floats, Floats]:
    """(lengths (n,), directions (n, dim)) of (n, dim); a zero vector has the direction 0."""
    largest = np.abs(array).max(axis=-1, keepdims=True)  # so that no square overflows or vanishes
    scaled = array / np.where(largest > 0, largest, 1)
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    with np.errstate(over="ignore"):
        total = (largest * norms)[:, 0]
    if not np.isfinite(total).all():
        raise TBQError(f"x has a vector that is longer than the largest {array.dtype}")
    return total, scaled / np.where(norms > 0, norms, 1)


def slices(rows: int, dim: int) -> list[slice]:
    """All of rows, a bounded number of values at a time."""
    step = max(1, _CHUNK // dim)
    return [slice(i, i + step) for i in range(0, rows, step)]


def seed(value: SupportsIndex) -> int:
    return integer(value, "seed", 0, 2**64 - 1)


def stream(seed: int, purpose: str) -> np.random.RandomState:
    """Random numbers of a seed, others for each purpose.

    RandomState, because NumPy guarantees its streams across versions and platforms, which it does not for Generator.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *purpose.encode()])))
