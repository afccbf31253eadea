# SPDX-License-Identifier: MIT
"""Checks the arguments of an index."""

import operator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.index.layout import LONGEST, Floats, Ids

LAST_ID = (1 << 63) - 2


def as_numbers(values: npt.ArrayLike, what: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise TBQError(f"{what} are ragged; rows must have one length") from None
    if array.dtype.kind not in "fiu":
        raise TBQError(f"the dtype of {what} is {array.dtype}; it must be a type of real numbers")
    return array


def unit_vectors(x: Floats, what: str, row: int, *, allow_zero: bool) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Returns the vectors scaled to length 1 (a zero vector stays zero), and their lengths.

    Raises TBQError for a vector with a NaN or an infinity, or too long; for a zero vector unless allow_zero.
    """
    largest = np.abs(x).max(axis=1)
    refuse_rows(~np.isfinite(largest), what, row, "holds a NaN or an infinity")
    if not allow_zero:
        refuse_rows(largest == 0, what, row, "is zero, which has no cosine with anything")
    scale: Floats = np.where(largest > 0, largest, np.float32(1))
    unit: Floats = np.divide(x, scale[:, None])  # so that no square overflows or underflows
    length = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    unit /= np.where(length > 0, length, np.float32(1))[:, None]
    lengths = scale.astype(np.float64) * length.astype(np.float64)
    refuse_rows(lengths >= LONGEST, what, row, "has a length of 2^60 or more")
    return unit, lengths


def refuse_rows(bad: npt.NDArray[np.bool_], what: str, row: int, why: str) -> None:
    """Raises TBQError for the first bad row.  row: the caller's number of the first row."""
    if bad.any():
        raise TBQError(f"{what}[{row + int(bad.argmax())}] {why}")


def check_integer(value: SupportsIndex, name: str, least: int, most: int, note: str = "") -> int:
    try:
        n = operator.index(value)
    except TypeError:
        raise TBQError(f"{name} is {value!r}; it must be an integer from {least} to {most}") from None
    if not least <= n <= most:
        raise TBQError(f"{name} is {n}; it must be from {least} to {most}{note}")
    return n


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise TBQError(f"{name} {value!r} is not one of {', '.join(map(str, choices))}")
    return value


def as_ids(ids: npt.ArrayLike) -> Ids:
    """Returns ids as int64 with one axis."""
    try:
        array = np.asarray(ids)
    except ValueError:
        raise TBQError("ids are ragged; they must be integers of shape (n,)") from None
    if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
        raise TBQError(f"ids have shape {array.shape} and dtype {array.dtype}; they must be integers of shape (n,)")
    array = np.atleast_1d(array)
    if array.size and (array.min() < 0 or array.max() > LAST_ID):
        raise TBQError(f"id {array.min() if array.min() < 0 else array.max()} is not from 0 to 2^63 - 2")
    return array.astype(np.int64)


def check_unique(ids: Ids) -> None:
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise TBQError(f"id {twice[0]} occurs twice")
