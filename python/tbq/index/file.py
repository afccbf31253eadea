# SPDX-License-Identifier: MIT
"""The file of an index."""
import math
import os
import struct
import sys
from typing import Any

import numpy as np

from tbq import _files
from tbq.errors import TBQError

MAGIC, VERSION, ALIGN, HEADER = b"TBQINDEX", 2, 64, 128
START = struct.Struct("<8s2I")
_OLD_SECTIONS = ("d", "codes", "mul", "add", "ids", "originals")
FORMATS = {1: (struct.Struct("<8s6I3Q"), _OLD_SECTIONS), 2: (struct.Struct("<8s6I3Q2I"), ("center", *_OLD_SECTIONS, "first"))}
SUM = struct.Struct("<I")


def section_offsets(layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> list[int]:
    """Where each section begins, and where the last one ends."""
    offsets, at = [], HEADER
    for shape, dtype in layout.values():
        offsets.append(at := -(-at // ALIGN) * ALIGN)
        at += math.prod(shape) * dtype.itemsize
    return [*offsets, at]


def check_little_endian() -> None:
    if sys.byteorder != "little":
        raise TBQError("files of indices are for little-endian machines")


def write_sections(path: str | os.PathLike[str], sections: "list[bytes | memoryview]") -> None:
    """Writes sections at multiples of 64, the first filled up to the header's size: the whole file or none of it."""
    with _files.writing(path) as (file,):
        for i, section in enumerate(sections):
            file.write(bytes(-file.tell() % (HEADER if i == 1 else ALIGN)))
            file.write(section)
