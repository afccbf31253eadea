# SPDX-License-Identifier: MIT
"""Writes the file of an index in one step, checks it, and maps it into memory.

tbq.index.index documents its layout.
"""

import math
import mmap
import os
import pathlib
import stat
import struct
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tbq import _files
from tbq._version import FORMAT_VERSION
from tbq.errors import TBQError
from tbq.index.layout import (
    ALIGN,
    ESTIMATORS,
    FIRST,
    GIVEN,
    KEEPS,
    LONGEST,
    MEASURING,
    METRICS,
    MOST_DIMENSIONS,
    Properties,
    as_bytes,
)

MAGIC, VERSION, HEADER = b"TBQINDEX", 2, 128
START = struct.Struct("<8s2I")
_OLD_SECTIONS = ("d", "codes", "mul", "add", "ids", "originals")
#: By version: the fields of the header, and the names of the sections.  Their checksums follow the fields.
FORMATS = {
    1: (struct.Struct("<8s6I3Q"), _OLD_SECTIONS),
    2: (struct.Struct("<8s6I3Q2I"), ("center", *_OLD_SECTIONS, "first")),
}
SUM = struct.Struct("<I")

Arrays = dict[str, npt.NDArray[Any]]


def save(path: str | os.PathLike[str], properties: Properties, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes the file of an index, or nothing.  arrays: may have room for more vectors than the index has."""
    _check_little_endian()
    sections = [arrays[name][: shape[0]] for name, (shape, _) in properties.arrays().items()]
    p = properties
    head = FORMATS[VERSION][0].pack(
        MAGIC,
        VERSION,
        FORMAT_VERSION,
        p.bits,
        METRICS.index(p.metric),
        ESTIMATORS.index(p.estimator),
        KEEPS[p.keep],
        p.dim,
        p.n,
        p.next_id,
        p.centered,
        p.source,
    )
    head += b"".join(SUM.pack(zlib.crc32(as_bytes(section))) for section in sections)
    head += SUM.pack(zlib.crc32(head))
    with _files.writing(path) as (file,):
        contents: list[bytes | memoryview] = [head, *map(as_bytes, sections)]
        for i, section in enumerate(contents):
            file.write(bytes(-file.tell() % (HEADER if i == 1 else ALIGN)))
            file.write(section)


def load(path: pathlib.Path, verify: bool) -> tuple[Properties, Arrays]:
    """Reads the header of a file, and maps its arrays into memory, read-only.  Index.load() documents the errors."""
    _check_little_endian()
    if not stat.S_ISREG(path.stat().st_mode):
        raise TBQError(f"{path} is not a regular file")
    with path.open("rb") as file:
        properties, sums = read_header(file.read(HEADER), path)
        size = os.fstat(file.fileno()).st_size
        layout = {name: array for name, array in properties.arrays().items() if name in sums}
        expected = _offsets(layout)
        if size != expected[-1]:
            raise TBQError(
                f"{path} has {size} bytes; an index of {properties.n} vectors has {expected[-1]}: "
                "it is truncated or corrupt"
            )
        with _files.naming(path):
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    for (name, (shape, dtype)), at in zip(layout.items(), expected):
        arrays[name] = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        if verify and zlib.crc32(as_bytes(arrays[name])) != sums[name]:
            raise TBQError(f"{path} is corrupt: the checksum of its section {name!r} is wrong")
    if "center" in arrays and not float(np.linalg.norm(arrays["center"].astype(np.float64))) < LONGEST:
        raise TBQError(f"{path} is corrupt: its center has a NaN or is too far away")
    if verify:
        _check_values(path, properties, arrays)
    return properties, arrays


def read_header(head: bytes, path: pathlib.Path) -> tuple[Properties, dict[str, int]]:
    """Returns the properties in a header and the checksums of the sections; TBQError if it is invalid.

    path: for messages.
    """
    if len(head) < len(MAGIC) or not head.startswith(MAGIC):
        raise TBQError(f"{path} is not an index of tbq")
    if len(head) < HEADER:
        raise TBQError(f"{path} has {len(head)} bytes; its header has {HEADER}: it is truncated")
    _, version, blocks_version = START.unpack_from(head)
    if version not in FORMATS or blocks_version != FORMAT_VERSION:
        raise TBQError(
            f"{path} has version {version}.{blocks_version}; this tbq reads "
            f"{' and '.join(f'{known}.{FORMAT_VERSION}' for known in FORMATS)}"
        )
    fixed, names = FORMATS[version]
    at = fixed.size + len(names) * SUM.size
    if SUM.unpack_from(head, at)[0] != zlib.crc32(head[:at]):
        raise TBQError(f"{path} is corrupt: the checksum of its header is wrong")
    bits, metric, estimator, keep, dim, n, next_id, centered, source = (*fixed.unpack_from(head)[3:], 0, GIVEN)[:9]
    kept = next((name for name, size in KEEPS.items() if size == keep), "unknown")
    if (
        not 2 <= bits <= 4
        or metric >= len(METRICS)
        or estimator >= len(ESTIMATORS)
        or kept == "unknown"
        or not 1 <= dim <= MOST_DIMENSIONS
        or max(n, next_id) >= 1 << 63
        or centered > 1
        or source > MEASURING
        or (source == MEASURING and n >= FIRST)
        or any(head[at + SUM.size :])
    ):
        raise TBQError(f"{path} is corrupt: its header is invalid")
    properties = Properties(dim, bits, METRICS[metric], ESTIMATORS[estimator], kept, n, next_id, bool(centered), source)
    return properties, {name: sum for name, (sum,) in zip(names, SUM.iter_unpack(head[fixed.size : at]))}


def _check_values(path: pathlib.Path, properties: Properties, arrays: Arrays) -> None:
    """Checks values that could be wrong under valid checksums, in a forged file."""
    ids = np.sort(arrays["ids"])
    if len(ids) and (ids[0] < 0 or ids[-1] >= properties.next_id or (ids[1:] == ids[:-1]).any()):
        raise TBQError(f"{path} is corrupt: an id occurs twice or is out of range")
    if not all(np.isfinite(arrays[name]).all() for name in ("d", "mul", "add", "first") if name in arrays):
        raise TBQError(f"{path} is corrupt: it has a NaN or an infinity")


def _offsets(layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> list[int]:
    """Returns the offset of each section, and the end of the last one."""
    offsets, at = [], HEADER
    for shape, dtype in layout.values():
        offsets.append(at := -(-at // ALIGN) * ALIGN)
        at += math.prod(shape) * dtype.itemsize
    return [*offsets, at]


def _check_little_endian() -> None:
    if sys.byteorder != "little":
        raise TBQError("files of indices can be used on little-endian machines only")
