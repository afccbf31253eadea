# SPDX-License-Identifier: MIT
"""The arrays of an index: their shapes and dtypes, in memory and in its file."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tbq._ffi import lib
from tbq._types import BLOCK, types

Metric = Literal["ip", "cosine", "l2"]
Estimator = Literal["mse", "unbiased"]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

METRICS: tuple[Metric, ...] = ("ip", "cosine", "l2")
ESTIMATORS: tuple[Estimator, ...] = ("mse", "unbiased")
ALIGN = 64  # bytes: sections of a file, arrays in memory
KEEPS = {None: 0, "float16": 2, "float32": 4}
LANES = 16  # vectors in a group, as in tbq-search.h
LONGEST = 2.0**60  # the length that a vector must not reach: below it, products and squares fit floats
MOST_DIMENSIONS = 1 << 20

FIRST = 256  # vectors from which the center is measured
GIVEN, MEASURED, MEASURING = 0, 1, 2  # the source of the center, as in a file


@dataclass(frozen=True)
class Properties:
    """Everything about an index except its arrays."""

    dim: int
    bits: int
    metric: Metric
    estimator: Estimator
    keep: str | None  #: dtype of the vectors that are kept
    n: int  #: number of vectors
    next_id: int
    centered: bool
    source: int  #: source of the center: GIVEN, MEASURED or MEASURING

    @property
    def type_id(self) -> int:
        """ggml's number of the blocks' type."""
        return types[f"tbq{self.bits}_0"].id

    @property
    def blocks(self) -> int:
        """Blocks of 64 values in a vector."""
        return -(-self.dim // BLOCK)

    def arrays(self, n: int | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Returns the shape and dtype of each array, in the order of the file, for n vectors (self.n if None)."""
        n = self.n if n is None else n
        groups = -(-n // LANES)
        lanes = groups * LANES
        return {
            "center": ((self.dim if self.centered else 0,), np.dtype("<f4")),
            "d": ((groups, self.blocks, LANES), np.dtype("<f2")),
            "codes": ((groups, self.blocks, lib.tbq_search_words(self.type_id), LANES), np.dtype("<u4")),
            "mul": ((lanes,), np.dtype("<f4")),
            "add": ((lanes if self.metric == "l2" or self.centered else 0,), np.dtype("<f4")),
            "ids": ((n,), np.dtype("<i8")),
            "originals": ((n if self.keep else 0, self.dim), np.dtype(self.keep or np.float16)),
            "first": ((n if self.source == MEASURING else 0, self.dim), np.dtype("<f4")),
        }


def lane_index(name: str, positions: Ids) -> Any:
    """Returns the index that selects the vectors at these positions in an array; vectors are the first axis then."""
    return (positions // LANES, ..., positions % LANES) if name in ("d", "codes") else positions


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Returns zeros, aligned to 64 bytes so that no vector register is loaded from two cache lines."""
    size = math.prod(shape) * dtype.itemsize
    if size > sys.maxsize - ALIGN:  # NumPy would raise one of several other errors
        raise MemoryError
    raw = np.zeros(size + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


def as_bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
