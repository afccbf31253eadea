# SPDX-License-Identifier: MIT
"""How the arrays of an index are laid out in memory and in its file."""
import math
import sys
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tbq.index.file import ALIGN

Metric = Literal["ip", "cosine", "l2"]
Estimator = Literal["mse", "unbiased"]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

METRICS = ("ip", "cosine", "l2")
ESTIMATORS = ("mse", "unbiased")
KEEPS = {None: 0, "float16": 2, "float32": 4}
LANES = 16  # vectors of a group, as in tbq-scan.h
LONGEST = 2.0**60  # of a vector: products and squares then fit floats
MOST_DIMENSIONS = 1 << 20

FIRST = 256  # vectors that the center is measured from
GIVEN, MEASURED, MEASURING = 0, 1, 2  # where it is from, as in a file


def places_in(name: str, places: Ids) -> Any:
    """What indexes the vectors at places in an array: the places come first in the result, whatever is between."""
    return (places // LANES, ..., places % LANES) if name in ("d", "codes") else places


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Aligned to 64 bytes, so that no vector register is loaded from two cache lines."""
    size = math.prod(shape) * dtype.itemsize
    if size > sys.maxsize - ALIGN:  # NumPy's own error is one of several
        raise MemoryError
    raw = np.zeros(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start:start + size].view(dtype).reshape(shape)


def as_bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
