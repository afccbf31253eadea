"""Reads what a GGUF file says about its tensors without reading the tensors."""
import math
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tbq._types import types
from tbq.blocks import dequantize
from tbq.errors import TBQError

_BLOCKS: Mapping[int, tuple[int, int]] = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items()} | {
    info.id: (64, info.block_bytes) for info in types.values()}
_TBQ: Mapping[int, str] = {info.id: info.name for info in types.values()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file that stays mapped, not read."""

    name: str
    shape: tuple[int, ...]  #: as NumPy has it: rows first
    type: int  #: GGML type number
    bytes: int
    _data: npt.NDArray[np.uint8]

    def rows(self, step: int = 1, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Every step-th row as float32, (rows, columns); TBQError for a type that has no decoder here."""
        rows = self._data.reshape(-1, self._data.size // max(1, math.prod(self.shape[:-1])))[start:stop:step]
        columns = self.shape[-1]
        if self.type in _TBQ:
            decode: Callable[..., npt.NDArray[np.float32]] = dequantize
            return decode(np.ascontiguousarray(rows), _TBQ[self.type], (len(rows), columns))
        try:
            decoded = gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType(self.type))
        except (NotImplementedError, ValueError, KeyError):
            raise TBQError(f"tensor {self.name!r} is of type {self.type}, which cannot be decoded here") from None
        return np.asarray(decoded, np.float32).reshape(len(rows), columns)


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a model, of all its files if it is split."""

    path: pathlib.Path
    fields: Mapping[str, Any]  #: arrays of numbers as lists; arrays of strings as their length
    tensors: Mapping[str, Tensor]


class _Reader(gguf.GGUFReader):
    """GGUFReader that refuses to read past the end, skips the vocabulary, and knows the tbq types."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"ends at byte {self.data.size}, in the middle of what its header describes")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        number = self.gguf_scalar_to_np.get(kind)
        if number is not None:  # one part instead of one for each element
            values = self._get(start, number, length)
            return 12 + values.nbytes, [values], [0], [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            raise ValueError(f"has an array of type {kind.name}")
        data = self.data.data
        size, order = start, "<Q" if self.endianess == gguf.GGUFEndian.LITTLE else ">Q"
        try:
            for _ in range(length):  # a vocabulary of 250,000 tokens takes 0.1 s like this and 5 s as arrays
                size += 8 + struct.unpack_from(order, data, size)[0]
        except struct.error:
            size = self.data.size + 1
        if size > self.data.size:
            raise ValueError(f"ends at byte {self.data.size}, in the middle of an array of strings")
        return size - orig_offs, [np.array([length])], [0], [gguf.GGUFValueType.ARRAY, kind]

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        self.infos: list[Tensor] = []
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            shape, kind = tuple(int(n) for n in reversed(dims)), int(kind[0])
            block, size = _BLOCKS.get(kind, (0, 0))
            if block == 0 or not shape or shape[-1] % block:
                raise ValueError(f"has tensor {field.name!r} of type {kind} and shape {shape}, which is no tensor of llama.cpp")
            count = math.prod(shape) // block * size
            self.infos.append(Tensor(field.name, shape, kind, count, self._get(start_offs + int(offset[0]), np.uint8, count)))


def _value(field: Any) -> Any:
    kinds = field.types
    if kinds[0] == gguf.GGUFValueType.STRING:
        return bytes(field.parts[-1]).decode("utf-8", "replace")
    if kinds[0] == gguf.GGUFValueType.ARRAY:
        values = field.parts[-1]
        return int(values[0]) if kinds[1] == gguf.GGUFValueType.STRING else values.tolist()
    return field.parts[-1].tolist()[0]


def _read(path: pathlib.Path) -> tuple[dict[str, Any], list[Tensor]]:
    if path.is_dir():
        raise TBQError(f"model {str(path)!r} is a folder; a GGUF file is needed")
    try:
        reader = _Reader(path)
    except FileNotFoundError:
        raise TBQError(f"model {str(path)!r} does not exist") from None
    except OSError as error:
        raise TBQError(f"model {str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        # the messages of GGUFReader name no file
        raise TBQError(f"model {str(path)!r} is no GGUF file that can be used: {error}") from None
    return {name: _value(field) for name, field in reader.fields.items()}, reader.infos


def open_header(model: str | pathlib.Path) -> Header:
    """The header of a GGUF file, and of the other files if it is the first of a split model.

    Raises TBQError if the file, or another of the split, is missing, damaged or no GGUF.
    """
    path = pathlib.Path(model)
    fields, infos = _read(path)
    if fields.get("split.no", 0):
        raise TBQError(f"model {str(path)!r} is file {fields['split.no'] + 1} of a split model; name the first, which has the metadata")
    parts = fields.get("split.count", 0)
    if parts > 1:
        name = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
        if name is None or int(name[2]) != parts:
            raise TBQError(f"model {str(path)!r} has {parts} files; the name of the first must end in -00001-of-{parts:05}.gguf")
        for i in range(2, parts + 1):
            infos += _read(path.with_name(f"{name[1]}-{i:05}-of-{name[2]}.gguf"))[1]
    return Header(path, fields, {info.name: info for info in infos})
