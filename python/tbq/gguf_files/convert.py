# SPDX-License-Identifier: MIT
"""Converts the weights of GGUF files to another type: `tbq convert`."""

import collections
import contextlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType

from tbq import _files
from tbq._arguments import cores
from tbq._types import types
from tbq._version import FORMAT_VERSION
from tbq.errors import TBQError
from tbq.gguf_files.codecs import decoder, encoder
from tbq.gguf_files.reader import (
    FORMAT_KEY,
    GGUFModel,
    Tensor,
    as_path,
    make_entry,
    make_header,
    open_gguf,
    read_pieces,
)
from tbq.gguf_files.rules import FILE_TYPES, fitting_type, wanted_types

#: Values that a thread converts at a time: a multiple of every type's block.
CHUNK = 1 << 20

#: From this value on the scale of a block may leave the range of f16.
_LARGE = 65504 / 8


@dataclass(frozen=True)
class Conversion:
    """The result of convert()."""

    files: tuple[pathlib.Path, ...]
    bytes_in: int  #: of the tensors
    bytes_out: int
    bits_per_value: float  #: of all tensors that were written
    counts: dict[tuple[str, str], int]  #: (type before, type after): tensors
    #: for each tensor that did not get its type, by name: the type that it has, and why
    notes: dict[str, str] = field(default_factory=dict)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "tbq4_0",
    *,
    tensors: Sequence[tuple[str, str]] = (),
    force: bool = False,
    split_bytes: int | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Conversion:
    """Writes a GGUF file with weights of another type.

    source: a file, or one file of a split (all files of the split are read).
    target: the file to write; it appears when it is complete.
    type: tbq2_0, tbq3_0, tbq4_0, q8_0, f16, bf16 or f32.  llama-quantize's rules decide which tensors get it: norms and
    other small tensors keep their type; the output matrix (or embeddings that serve as one) gets q6_K or q8_0.  If type
    is a float type, every tbq tensor is converted.
    tensors: (pattern, type) pairs, which take precedence over these rules.  The first pattern that is found in a
    tensor's name counts.  Any type of llama.cpp that needs no importance matrix is possible.
    force: replace target if it exists.
    split_bytes: write several files, each with at most so many bytes of tensors: NAME-00001-of-00003.gguf.
    threads: all cores if None.  progress: show a bar.
    Weights that were quantized before lose precision a second time.  A tensor keeps its type if the block of the new
    type does not divide its rows; see Conversion.notes.
    Raises TBQError for a bad file, type, pattern or value (NaN, infinity).  Then no file is left behind.
    """
    path = as_path(target)
    if threads is None:
        threads = cores()
    for name, value in (("threads", threads), ("split_bytes", split_bytes)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise TBQError(f"{name} is {value!r}; it must be an integer, at least 1")
    model = open_gguf(source)
    notes: dict[str, str] = {}
    plan = [
        (tensor, fitting_type(tensor, wanted, notes))
        for tensor, wanted in zip(model.tensors, wanted_types(model, type, tensors))
    ]
    parts = _assign_to_files(plan, path, split_bytes)
    names = [name for name, _ in parts]
    _check_target(model, names, force)
    headers = [_part_header(model, parts, i, FILE_TYPES[type]) for i in range(len(parts))]
    try:
        # the first file of a split gets its name last: without it, no program opens the others
        with (
            _files.writing(path, names) as files,
            _progress_bar(plan, progress) as advance,
            ThreadPoolExecutor(threads) as pool,
        ):
            _check_room(names, headers)  # after the files that a killed writer left are gone
            for (_, part), (text, offsets, size), file in zip(parts, headers, files):
                file.write(text)
                for tensor, offset, data in _convert_tensors(part, offsets, pool, 2 * threads):
                    file.write(bytes(offset - file.tell()) if offset > file.tell() else b"")
                    file.write(data)
                    advance(tensor, len(data))
                file.write(bytes(size - file.tell()))
    except OSError as error:
        if error.filename not in map(str, names):  # the source, for example
            raise
        raise TBQError(f"{error.filename} cannot be written: {error.strerror}") from None
    return _summarize(plan, names, notes)


TypedTensors = list[tuple[Tensor, GGML]]


# --- the files ----------------------------------------------------------------------------------------------------


def _bytes_as(tensor: Tensor, type: GGML) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    return tensor.n_values // block * block_bytes


def _assign_to_files(
    plan: TypedTensors, target: pathlib.Path, limit: int | None
) -> list[tuple[pathlib.Path, TypedTensors]]:
    """Assigns tensors to the files to write: one file if limit is None or everything fits in one."""
    groups: list[TypedTensors] = [[]]
    size = 0
    for tensor, type in plan:
        size += _bytes_as(tensor, type)
        if limit is not None and size > limit and groups[-1]:
            groups.append([])
            size = _bytes_as(tensor, type)
        groups[-1].append((tensor, type))
    if len(groups) == 1:
        return [(target, plan)]
    if len(groups) > 0xFFFF:
        raise TBQError(f"{limit} bytes a file would make {len(groups)} files; 65535 are possible")
    stem = target.name.removesuffix(".gguf")
    return [(target.with_name(f"{stem}-{i + 1:05}-of-{len(groups):05}.gguf"), group) for i, group in enumerate(groups)]


def _part_header(
    model: GGUFModel, parts: list[tuple[pathlib.Path, TypedTensors]], index: int, file_type: int
) -> tuple[bytes, list[int], int]:
    """Returns the header of a part.  The first part has the metadata of the source, with what changes replaced."""
    entries: dict[str, bytes] = {}

    def put(key: str, kind: GGUFValueType, value: int) -> None:
        entries[key] = make_entry(key, kind, value)

    if index == 0:
        entries.update(model.metadata.raw)
        put(gguf.Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, gguf.GGML_QUANT_VERSION)
        put(gguf.Keys.General.FILE_TYPE, GGUFValueType.UINT32, int(file_type))
        for key in (FORMAT_KEY, *_SPLIT_KEYS):
            entries.pop(key, None)
        if any(type.name.lower() in types for _, part in parts for _, type in part):
            put(FORMAT_KEY, GGUFValueType.UINT32, FORMAT_VERSION)
    elif gguf.Keys.General.ALIGNMENT in model.metadata:
        put(gguf.Keys.General.ALIGNMENT, GGUFValueType.UINT32, model.metadata.alignment)
    if len(parts) > 1:
        put(gguf.Keys.Split.LLM_KV_SPLIT_NO, GGUFValueType.UINT16, index)
        put(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, GGUFValueType.UINT16, len(parts))
        put(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, GGUFValueType.INT32, sum(len(part) for _, part in parts))
    return make_header(
        entries, [(tensor.name, type, tensor.shape) for tensor, type in parts[index][1]], model.metadata.alignment
    )


_SPLIT_KEYS = (
    gguf.Keys.Split.LLM_KV_SPLIT_NO,
    gguf.Keys.Split.LLM_KV_SPLIT_COUNT,
    gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
)


def _check_target(model: GGUFModel, paths: list[pathlib.Path], force: bool) -> None:
    for path in paths:
        folder = _files.target(path).parent
        if not folder.is_dir():
            raise TBQError(f"folder {folder} does not exist")
        if not os.access(folder, os.W_OK):
            raise TBQError(f"folder {folder} cannot be written to")
        if path.exists():
            if any(path.samefile(file) for file in model.files):
                raise TBQError(f"{path} is the file that is read; name another one")
            if not force:
                raise TBQError(f"{path} exists; --force replaces it")


def _check_room(paths: list[pathlib.Path], headers: list[tuple[bytes, list[int], int]]) -> None:
    need: collections.Counter[pathlib.Path] = collections.Counter()
    for path, (_, _, size) in zip(paths, headers):
        folder = _files.target(path).parent
        need[folder] += size
        if need[folder] > shutil.disk_usage(folder).free:
            raise TBQError(f"{path} cannot be written: {folder} has no room for {need[folder]} bytes")


# --- the tensors --------------------------------------------------------------------------------------------------


def _convert_tensors(
    plan: TypedTensors, offsets: list[int], pool: ThreadPoolExecutor, window: int
) -> Iterator[tuple[Tensor, int, Any]]:
    """Yields (tensor, offset in the file, bytes) in the order of the file.  Converts up to `window` pieces in advance.

    The offset is 0 for a piece that follows the one before it.
    """
    waiting: collections.deque[tuple[Tensor, int, Future[Any]]] = collections.deque()
    try:
        for (tensor, type), offset in zip(plan, offsets):
            convert_piece = _piece_converter(tensor, type)
            for i, data in enumerate(read_pieces(tensor, CHUNK)):
                waiting.append((tensor, 0 if i else offset, pool.submit(convert_piece, data)))
                if len(waiting) >= window:
                    first, at, future = waiting.popleft()
                    yield first, at, future.result()
        while waiting:
            first, at, future = waiting.popleft()
            yield first, at, future.result()
    finally:
        for _, _, future in waiting:
            future.cancel()


def _piece_converter(tensor: Tensor, type: GGML) -> Callable[[np.ndarray[Any, np.dtype[np.uint8]]], Any]:
    """Returns the function that a thread calls for each piece of the tensor."""
    if type == tensor.type:
        return lambda data: data
    decode, encode = decoder(tensor.type), encoder(type)
    limit = float(np.finfo(np.float16).max) if type == GGML.F16 else None

    def convert_piece(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
        values = decode(data)
        low, high = float(values.min()), float(values.max())  # one NaN makes both of them NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise TBQError(f"tensor {tensor.name} has values that are not finite; the file is corrupt")
        if limit is not None and max(high, -low) > limit:
            raise TBQError(
                f"tensor {tensor.name} has values beyond {limit:.0f}, the largest of f16; bf16 and f32 can hold them"
            )
        result = encode(values)
        if type not in (GGML.F32, GGML.F16) and max(high, -low) > _LARGE:
            lost = np.linalg.norm(decoder(type)(result).astype(np.float64) - values)
            if not lost < 0.5 * np.linalg.norm(values.astype(np.float64)):  # with 2 bits a third is lost
                raise TBQError(
                    f"tensor {tensor.name} has values beyond the range of {type.name.lower()}; f32 can hold them"
                )
        return result

    return convert_piece


@contextlib.contextmanager
def _progress_bar(plan: TypedTensors, show: bool) -> Iterator[Callable[[Tensor, int], None]]:
    if not show:
        yield lambda tensor, size: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = sum(_bytes_as(tensor, type) for tensor, type in plan)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, disable=None) as bar:

        def advance(tensor: Tensor, size: int) -> None:
            bar.set_description(tensor.name, refresh=False)
            bar.update(size)

        yield advance


def _summarize(plan: TypedTensors, files: list[pathlib.Path], notes: dict[str, str]) -> Conversion:
    size = sum(_bytes_as(tensor, type) for tensor, type in plan)
    return Conversion(
        files=tuple(files),
        bytes_in=sum(tensor.n_bytes for tensor, _ in plan),
        bytes_out=size,
        bits_per_value=8 * size / max(1, sum(tensor.n_values for tensor, _ in plan)),
        counts=dict(collections.Counter((tensor.type.name.lower(), type.name.lower()) for tensor, type in plan)),
        notes=notes,
    )
