# SPDX-License-Identifier: MIT
"""Reads files of vectors."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tbq._files import naming
from tbq.errors import TBQError

_SHAPES = {1: "(n,)", 2: "(n, dim)"}  # by the number of axes


def read_vectors(path: pathlib.Path, axes: int = 2) -> npt.NDArray[Any]:
    """Maps the array of a .npy file into memory.

    Raises TBQError for a file that is not a .npy file or is truncated, and for another number of axes.
    """
    if not path.exists():
        raise TBQError(f"{path} does not exist")
    if not path.is_file():
        raise TBQError(f"{path} is not a regular file")
    try:
        with naming(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, SyntaxError) as error:
        why = str(error).splitlines()[0] if str(error) else "empty"
        raise TBQError(f"{path} is not a .npy file of numbers, or is truncated ({why})") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise TBQError(f"{path} is an archive; save one array with numpy.save")
    if array.ndim != axes or array.dtype.kind not in "fiu":
        raise TBQError(
            f"{path} has shape {array.shape} and dtype {array.dtype}; it must be numbers of shape {_SHAPES[axes]}"
        )
    return array


@contextlib.contextmanager
def room(n: int) -> Iterator[None]:
    """Turns a MemoryError into the TBQError that n vectors need too much memory."""
    try:
        yield
    except MemoryError:
        raise TBQError(f"memory has no room for what {n} vectors need") from None
