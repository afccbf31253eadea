# SPDX-License-Identifier: MIT
"""Checks of arguments, and random numbers from a seed."""

import operator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError

#: float32 or float64; a result has the dtype of the input.
Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_CHUNK = 1 << 21  # values at a time: intermediate rows are several times as large as the packed result


def check_integer(value: SupportsIndex, name: str, low: int, high: int | None = None) -> int:
    """Returns value as an int.  Raises TBQError unless low <= value <= high."""
    rule = f"from {low} to {high}" if high is not None else f"of at least {low}"
    try:
        n = operator.index(value)
    except TypeError:
        raise TBQError(f"{name} is {value!r}; it must be an integer {rule}") from None
    if n < low or high is not None and n > high:
        raise TBQError(f"{name} is {n}; it must be an integer {rule}")
    return n


def as_floats(values: npt.ArrayLike, name: str) -> Floats:
    """Returns values as a C-contiguous array.

    Raises TBQError unless it has dtype float32 or float64, at least one axis, no empty axis, and finite values.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise TBQError(f"{name} is not an array of numbers; its rows must have one length") from None
    if array.dtype not in _FLOATS:  # dtypes of another byte order are not equal
        raise TBQError(f"{name} has dtype {array.dtype}; it must be float32 or float64")
    if array.ndim == 0:
        raise TBQError(f"{name} has no axis; vectors are along its last axis")
    if array.size == 0:
        raise TBQError(f"{name} has shape {array.shape}; no axis may be empty")
    finite = np.isfinite(array)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
        raise TBQError(f"{name} has {array[index]} at {index}; every value must be finite")
    return np.ascontiguousarray(array)


def as_vectors(values: npt.ArrayLike, dim: int, name: str = "x") -> Floats:
    """Returns as_floats(values); its last axis must be dim."""
    array = as_floats(values, name)
    if array.shape[-1] != dim:
        raise TBQError(f"{name} has shape {array.shape}; its last axis must be {dim}")
    return array


def check_lengths(values: object, name: str) -> Floats:
    """Checks the lengths in a code.  Raises TBQError unless they are float32 or float64, finite and not negative."""
    if not isinstance(values, np.ndarray) or values.dtype not in _FLOATS:
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TBQError(f"{name} is {found}; it must be an array of float32 or float64")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise TBQError(f"{name} has a value that is negative or not finite; they are lengths of vectors")
    return values


def split_lengths(array: Floats) -> tuple[Floats, Floats]:
    """Splits (n, dim) into lengths (n,) and directions (n, dim).  A zero vector has the direction 0."""
    largest = np.abs(array).max(axis=-1, keepdims=True)  # so that no square overflows or underflows
    scaled = array / np.where(largest > 0, largest, 1)
    norms = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    with np.errstate(over="ignore"):
        total = (largest * norms)[:, 0]
    if not np.isfinite(total).all():
        raise TBQError(f"x has a vector that is longer than the largest {array.dtype}")
    return total, scaled / np.where(norms > 0, norms, 1)


def slices(rows: int, dim: int) -> list[slice]:
    """Returns slices that cover all rows, each of a bounded number of values."""
    step = max(1, _CHUNK // dim)
    return [slice(i, i + step) for i in range(0, rows, step)]


def check_seed(value: SupportsIndex) -> int:
    return check_integer(value, "seed", 0, 2**64 - 1)


def random_stream(seed: int, purpose: str) -> np.random.RandomState:
    """Returns random numbers for a seed, different ones for each purpose.

    It is a RandomState, because NumPy guarantees its streams across versions and platforms; Generator's may change.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *purpose.encode()])))
