# SPDX-License-Identifier: MIT
"""Files of vectors, and `tbq search`."""

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
    """The array of a .npy file, memory-mapped.  TBQError if it is none, is truncated, or has another number of axes."""
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
    try:
        yield
    except MemoryError:
        raise TBQError(f"memory has no room for what {n} vectors need") from None
