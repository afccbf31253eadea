# SPDX-License-Identifier: MIT
"""Opens GGUF files that may be corrupt or hostile.

Every count, length, offset and size is compared with the size of the file before it is used.

gguf.GGUFReader is not used, for three reasons.  It trusts these numbers.  It makes an array of each element of each
list, which takes 3 s for a vocabulary of 49,000; this module takes 0.1 s.  And it does not keep the bytes of an entry,
which are needed to copy the entry unchanged.  The constants of the format are those of the package gguf.
"""

import os
import pathlib
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

import tbq.gguf_files.register  # noqa: F401  adds the numbers of the tbq types to gguf
from tbq._version import FORMAT_VERSION
from tbq.errors import TBQError

#: Bytes of the longest header that is read; a vocabulary of 256,000 tokens takes 16 MiB.
MAX_HEADER = 256 << 20
#: As in ggml: GGML_MAX_DIMS and GGML_MAX_NAME, which includes the terminator.
MAX_DIMS, MAX_NAME = 4, 64
#: Tensors, and entries of the metadata: far more than any model has, so few that their objects take little memory.
MAX_COUNT = 1 << 17
#: Padding beyond a page of memory has no use, but would be written.
MAX_ALIGNMENT = 1 << 16

#: The key of the version of the block layout, in files with tbq tensors.
FORMAT_KEY = "tbq.format_version"

#: struct's letter for each value of fixed size.
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is.  open_gguf has checked that the file has these bytes.

    An axis of 0 is legal; n_bytes is 0 then.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  #: in NumPy's order: the values of a row are the last axis; at least one axis
    path: pathlib.Path  #: the file, which may be one of a split
    offset: int  #: position of the first byte in that file
    n_bytes: int

    @property
    def n_values(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_value(self) -> float:
        """Bits per value of the type, so that a tensor without values has them too."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return 8 * block_bytes / block


class Metadata(Mapping[str, Any]):
    """The entries by key, decoded on access: int, float, bool, str, or a list of them.

    raw[key] has the bytes of the whole entry in the file, including the key.
    """

    def __init__(self, entries: Mapping[str, tuple[bytes, int]]) -> None:
        self._entries = entries  # key: (bytes, offset of the type in them)

    def __getitem__(self, key: str) -> Any:
        entry, start = self._entries[key]
        cursor = _Cursor.from_bytes(entry[start:])
        return _read_value(cursor, cursor.u32())

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def alignment(self) -> int:
        """The number that divides the offsets of tensors."""
        return int(self.get(gguf.Keys.General.ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT))

    def type(self, key: str) -> GGUFValueType:
        """Returns the type of the value of a key that exists."""
        data, start = self._entries[key]
        return GGUFValueType(_Cursor.from_bytes(data[start:]).u32())

    @property
    def raw(self) -> dict[str, bytes]:
        return {key: entry for key, (entry, _) in self._entries.items()}

    def integer(self, key: str, default: int) -> int:
        """Returns the value of a key, which must be an integer of 0 or more; default if there is no such key."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise TBQError(f"metadata {_shorten(key)} is {str(value)[:40]!r}; it must be an integer, 0 or more")
        return value


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file, or all files of a split.

    Functions that take the path of a model also take one of these; then they need not read the header again.
    """

    path: pathlib.Path  #: the file that open_gguf was given
    files: tuple[pathlib.Path, ...]
    metadata: Metadata = field(repr=False)  #: of the first file
    tensors: tuple[Tensor, ...] = field(repr=False)  #: in the order of the files

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def open_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Checks the header of a GGUF file and returns its contents.

    If the file is one of a split, the others are opened too; they must be in the same folder.
    Takes no more memory than the header's size (at most MAX_HEADER for each file).  Reads no tensor.
    Raises TBQError for a file that is not GGUF (version 2 or 3, little-endian), is truncated or contradicts itself.
    Raises OSError for a file that cannot be opened.
    """
    if isinstance(path, GGUFModel):
        return path
    path = as_path(path)
    metadata, tensors = _read_file(path)
    count = _split_count(path, metadata)
    if count < 2:
        return GGUFModel(path, (path,), metadata, tensors)
    match = _SPLIT_NAME.fullmatch(path.name)
    if not match or int(match[3]) != count:
        raise TBQError(f"{path} is one of {count} files of a split; its name must end in -00001-of-{count:05}.gguf")
    paths, parts = [], []
    for i in range(count):
        paths.append(path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf"))
        if not paths[i].exists():
            raise TBQError(f"{path} is one of {count} files of a split; {paths[i].name} is not in the same folder")
        parts.append((metadata, tensors) if paths[i] == path else _read_file(paths[i]))
        if (parts[i][0].integer("split.no", 0), _split_count(paths[i], parts[i][0])) != (i, count):
            raise TBQError(f"{paths[i]} is not file {i + 1} of {count} of the split, as its name says")
    everything = tuple(tensor for _, part in parts for tensor in part)
    expected = parts[0][0].integer("split.tensors.count", len(everything))
    if expected != len(everything):
        raise TBQError(f"{path}: the files of the split have {len(everything)} tensors, not {expected}")
    _check_unique([tensor.name for tensor in everything], path)
    return GGUFModel(path, tuple(paths), parts[0][0], everything)


def as_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a Path.  Raises TBQError for what cannot be the name of a file."""
    try:
        path = pathlib.Path(path)
        path.exists()  # Python 3.10 to 3.12 notice a null character only here
    except (TypeError, ValueError):
        raise TBQError(f"{path!r} cannot be the name of a file") from None
    if "\0" in str(path):
        raise TBQError(f"{path!r} cannot be the name of a file")
    return path


def read_pieces(tensor: Tensor, n_values: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields the bytes of a tensor from front to back, n_values values at a time (a multiple of every type's block)."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    left = tensor.n_bytes
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        while left:
            data = np.empty(min(left, n_values // block * block_bytes), np.uint8)
            view, got = data.data, 0
            while got < len(data):
                n = file.readinto(view[got:])
                if not n:
                    raise TBQError(f"{tensor.path} became shorter: tensor {tensor.name} is not complete")
                got += n
            yield data
            left -= len(data)


def make_header(
    entries: Mapping[str, bytes], tensors: Iterable[tuple[str, GGMLQuantizationType, tuple[int, ...]]], alignment: int
) -> tuple[bytes, list[int], int]:
    """Makes the header of a file.

    entries: by key, from Metadata.raw or make_entry().  tensors: names, types and shapes.
    Returns the bytes, padded; the offset of each tensor in the file; the size of the file.
    """
    infos, offsets, end = [], [], 0
    for name, type, shape in tensors:
        encoded = name.encode()
        infos.append(
            struct.pack(
                f"<Q{len(encoded)}sI{len(shape)}QIQ", len(encoded), encoded, len(shape), *reversed(shape), type, end
            )
        )
        offsets.append(end)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        end += _round_up(prod(shape) // block * block_bytes, alignment)
    start = struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(infos), len(entries))
    text = b"".join([start, *entries.values(), *infos])
    text += bytes(_round_up(len(text), alignment) - len(text))
    return text, [len(text) + offset for offset in offsets], len(text) + end


def make_entry(key: str, kind: GGUFValueType, value: int) -> bytes:
    """Makes an entry of the metadata, an integer."""
    encoded = key.encode()
    return struct.pack(f"<Q{len(encoded)}sI{_SCALARS[kind]}", len(encoded), encoded, kind, value)


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _split_count(path: pathlib.Path, metadata: Metadata) -> int:
    try:
        return metadata.integer("split.count", 0)
    except TBQError as error:
        raise TBQError(f"{path}: {error}") from None


class _Cursor:
    """Reads a header front to back, never beyond `end`."""

    def __init__(self, file: BinaryIO | None, end: int, path: object) -> None:
        self._file, self._end, self.path = file, end, path
        self.buffer = bytearray()
        self.position = 0

    @classmethod
    def from_bytes(cls, data: bytes) -> "_Cursor":
        cursor = cls(None, len(data), "metadata")
        cursor.buffer += data
        return cursor

    def require(self, size: int, what: str) -> None:
        """Checks that so many bytes follow, and reads them into `buffer`."""
        stop = self.position + size
        if stop > self._end:
            raise TBQError(f"{self.path} is truncated or not GGUF: {what} would end at byte {stop} of {self._end}")
        if stop > MAX_HEADER:
            raise TBQError(
                f"{self.path}: {what} would end at byte {stop}, beyond the {MAX_HEADER >> 20} MiB of a header"
            )
        while len(self.buffer) < stop:
            assert self._file is not None
            piece = self._file.read(max(1 << 16, stop - len(self.buffer)))
            if not piece:
                raise TBQError(f"{self.path} ends at byte {len(self.buffer)}; it became shorter")
            self.buffer += piece

    def unpack(self, letters: str, what: str) -> tuple[Any, ...]:
        form = struct.Struct("<" + letters)
        self.require(form.size, what)
        values = form.unpack_from(self.buffer, self.position)
        self.position += form.size
        return values

    def u32(self, what: str = "a value") -> int:
        return int(self.unpack("I", what)[0])

    def skip_string(self, what: str) -> tuple[int, int]:
        """Skips a string.  Returns the positions of its first byte and of the byte after its last."""
        (length,) = self.unpack("Q", f"the length of {what}")
        self.require(length, what)
        start = self.position
        self.position += length
        return start, self.position

    def skip_strings(self, count: int, what: str) -> None:
        """Skips many strings, without a call for each: the vocabulary is nearly all of a header."""
        unpack, buffer, position = struct.Struct("<Q").unpack_from, self.buffer, self.position
        for _ in range(count):
            if position + 8 > len(buffer) or position + 8 + unpack(buffer, position)[0] > len(buffer):
                self.position = position
                _, position = self.skip_string(what)  # reads more of the file, or raises
            else:
                position += 8 + unpack(buffer, position)[0]
        self.position = position

    def name(self, what: str, empty: bool = False) -> str:
        """Reads a string that can be printed on one line.  empty: whether it may have no characters."""
        start, stop = self.skip_string(what)
        try:
            text = self.buffer[start:stop].decode()
        except UnicodeDecodeError:
            raise TBQError(f"{self.path}: {what} is not text") from None
        if not (text or empty) or not text.isprintable():
            rule = "printable" if empty else "printable and not empty"
            raise TBQError(f"{self.path}: {what} is {text[:40]!r}; it must be {rule}")
        return text


def _shorten(key: str) -> str:
    """Shortens a key for a message; the longest one has 65535 bytes."""
    return key if len(key) <= 80 else f"{key[:80]}..."


def _read_array_head(cursor: _Cursor, what: str) -> tuple[GGUFValueType, int]:
    """Reads the type and the number of an array's elements, and checks that the file is long enough for them."""
    kind, count = cursor.unpack("IQ", what)
    if kind == GGUFValueType.ARRAY:
        raise TBQError(f"{cursor.path}: {what} is an array of arrays, which llama.cpp does not read either")
    if kind not in (*_SCALARS, GGUFValueType.STRING):
        raise TBQError(f"{cursor.path}: {what} is an array of type {kind}, which GGUF does not have")
    kind = GGUFValueType(kind)
    smallest = 8 if kind == GGUFValueType.STRING else struct.calcsize("<" + _SCALARS[kind])
    cursor.require(count * smallest, f"{what}, {count} elements,")
    return kind, count


def _skip_value(cursor: _Cursor, kind: int, what: str) -> None:
    if kind == GGUFValueType.STRING:
        cursor.skip_string(what)
    elif kind == GGUFValueType.ARRAY:
        element, count = _read_array_head(cursor, what)
        if element == GGUFValueType.STRING:
            cursor.skip_strings(count, what)
        else:
            cursor.position += count * struct.calcsize("<" + _SCALARS[element])
    elif kind in _SCALARS:
        cursor.unpack(_SCALARS[GGUFValueType(kind)], what)
    else:
        raise TBQError(f"{cursor.path}: {what} has type {kind}, which GGUF does not have")


def _read_value(cursor: _Cursor, kind: int) -> Any:
    """Decodes a value that _skip_value has checked."""

    def text() -> str:
        start, stop = cursor.skip_string("a string")
        return cursor.buffer[start:stop].decode(errors="replace")

    if kind == GGUFValueType.STRING:
        return text()
    if kind != GGUFValueType.ARRAY:
        return cursor.unpack(_SCALARS[GGUFValueType(kind)], "a value")[0]
    element, count = _read_array_head(cursor, "an array")
    if element == GGUFValueType.STRING:
        return [text() for _ in range(count)]
    return np.frombuffer(cursor.buffer, np.dtype("<" + _SCALARS[element]), count, cursor.position).tolist()


def _read_file(path: pathlib.Path) -> tuple[Metadata, tuple[Tensor, ...]]:
    if not stat.S_ISREG(path.stat().st_mode):
        raise TBQError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, size, path)
        n_tensors, n_entries = _read_counts(cursor, path)
        metadata = _read_entries(cursor, path, n_entries)
        if metadata.get(FORMAT_KEY, FORMAT_VERSION) != FORMAT_VERSION:
            raise TBQError(
                f"{path}: {FORMAT_KEY} is {str(metadata[FORMAT_KEY])[:40]!r}; this tbq reads {FORMAT_VERSION}"
            )
        return metadata, _read_tensors(cursor, path, n_tensors, _read_alignment(path, metadata), size)


def _read_counts(cursor: _Cursor, path: pathlib.Path) -> tuple[int, int]:
    magic = cursor.u32("the magic number")
    if magic != gguf.GGUF_MAGIC:
        raise TBQError(f"{path} is not a GGUF file: it begins with {bytes(cursor.buffer[:4])!r}")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise TBQError(f"{path} is big-endian; only little-endian GGUF files are read")
    if version not in (2, 3):
        raise TBQError(f"{path} has GGUF version {version}; 2 and 3 are read")
    n_tensors, n_entries = cursor.unpack("QQ", "the header")
    if max(n_tensors, n_entries) > MAX_COUNT:
        raise TBQError(
            f"{path} says that it has {n_tensors} tensors and {n_entries} entries; at most {MAX_COUNT} are read"
        )
    # The smallest tensor: length of the name, number of dimensions, type, offset.
    # The smallest entry: length of the key, one character, type, value of one byte.
    cursor.require(
        n_tensors * (8 + 4 + 4 + 8) + n_entries * (9 + 4 + 1),
        f"a header of {n_tensors} tensors and {n_entries} entries",
    )
    return n_tensors, n_entries


def _read_entries(cursor: _Cursor, path: pathlib.Path, count: int) -> Metadata:
    entries = {}
    for i in range(count):
        start = cursor.position
        key = cursor.name(f"key {i} of the metadata")
        if key in entries:
            raise TBQError(f"{path}: metadata {_shorten(key)} occurs twice")
        type_start, what = cursor.position, f"metadata {_shorten(key)}"
        _skip_value(cursor, cursor.u32(what), what)
        entries[key] = bytes(cursor.buffer[start : cursor.position]), type_start - start
    return Metadata(entries)


def _read_alignment(path: pathlib.Path, metadata: Metadata) -> int:
    """Returns the alignment.  llama.cpp's rule: the value is a uint32 and a power of two."""
    key = gguf.Keys.General.ALIGNMENT
    if key in metadata and metadata.type(key) != GGUFValueType.UINT32:
        raise TBQError(
            f"{path}: {key} is {str(metadata[key])[:40]!r} of type {metadata.type(key).name.lower()}; "
            "it must be a uint32"
        )
    value = metadata.alignment
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise TBQError(f"{path}: {key} is {value}; it must be a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(cursor: _Cursor, path: pathlib.Path, count: int, alignment: int, size: int) -> tuple[Tensor, ...]:
    found = []
    for i in range(count):
        name = cursor.name(f"the name of tensor {i}", empty=True)
        if len(name.encode()) >= MAX_NAME:
            raise TBQError(f"{path}: tensor {name[:40]!r}... has a name of {MAX_NAME} bytes or more")
        n_dims = cursor.u32(f"tensor {name}")
        if n_dims > MAX_DIMS:
            raise TBQError(f"{path}: tensor {name} has {n_dims} dimensions; {MAX_DIMS} are possible")
        *dims, kind, offset = cursor.unpack("Q" * n_dims + "IQ", f"tensor {name}")
        found.append((name, tuple(reversed(dims)) or (1,), kind, offset))  # a tensor of ggml has at least one axis
    start = _round_up(cursor.position, alignment)
    tensors = tuple(_check_tensor(path, *each, alignment, start, size) for each in found)
    _check_unique([tensor.name for tensor in tensors], path)
    end, before = start, ""
    # a tensor of no bytes has the same offset as the next one
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset < end:
            raise TBQError(f"{path}: tensors {before} and {tensor.name} overlap")
        end, before = tensor.offset + tensor.n_bytes, tensor.name
    return tensors


def _check_tensor(
    path: pathlib.Path, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int, start: int, size: int
) -> Tensor:
    try:
        type = GGMLQuantizationType(kind)
    except ValueError:
        raise TBQError(f"{path}: tensor {name} has type {kind}, which the installed gguf does not know") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[type]
    if shape[-1] % block:
        raise TBQError(f"{path}: tensor {name} is {type.name.lower()} in rows of {shape[-1]}; {block} must divide them")
    if 0 in shape and prod(n or 1 for n in shape) >= 2**60:  # NumPy multiplies them, although there are no values
        raise TBQError(
            f"{path}: tensor {name} has shape {shape}; its axes that are not 0 must multiply to less than 2^60"
        )
    n_bytes = prod(shape) // block * block_bytes
    if offset % alignment or start + offset + n_bytes > size:
        raise TBQError(
            f"{path} is truncated or corrupt: tensor {name} has {n_bytes} bytes at {start + offset}, the file {size}"
        )
    return Tensor(name, type, shape, path, start + offset, n_bytes)


def _check_unique(names: list[str], path: pathlib.Path) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise TBQError(f"{path}: tensor {name} occurs twice")
        seen.add(name)
