# SPDX-License-Identifier: MIT
"""What measurements and calibration need to know of a model: context, vocabulary, cache, checksum."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tbq.errors import TBQError
from tbq.gguf_files.reader import GGUFModel, open_gguf
from tbq.kv_cache.layers import GLOBAL, CacheShape, read_shape
from tbq.kv_cache.settings import apply_options
from tbq.kv_cache.type_pairs import Cache


@dataclasses.dataclass(frozen=True)
class Model:
    """What measurements need of a GGUF file's metadata."""

    path: pathlib.Path
    context: int  #: tokens that it was trained for, or that RoPE is scaled to; 0 if the file does not say
    vocab: int  #: tokens of the tokenizer; 0 without a tokenizer
    #: layers that grow with the text, so without sliding windows; None if llama.cpp's cache is not known here
    cache: Cache | None
    cached: bool = True  #: False if it keeps no keys and values (bert, mamba)
    opened: GGUFModel | None = dataclasses.field(default=None, repr=False, compare=False)

    def check_cached(self) -> None:
        """Raises TBQError if the model has no cache, so that there are no cache types to compare."""
        if not self.cached:
            raise TBQError(f"model {str(self.path)!r} keeps no keys and values, so there are no cache types to compare")


def read_model(path: str | os.PathLike[str], options: Sequence[str] = ()) -> Model:
    """The Model of a GGUF file, or of the first file of a split model.

    options: llama.cpp's options, of which --override-kv and the RoPE options count.
    Raises TBQError if the file is corrupt or is not a model.
    """
    opened = open_gguf(path)
    fields = opened.metadata
    fields.integer(f"{fields.get('general.architecture')}.context_length", 0)
    settings, tokens = apply_options(fields, options), fields.get("tokenizer.ggml.tokens")
    shape = _shape(settings.fields)
    return Model(
        pathlib.Path(path),
        settings.rope_context,
        len(tokens) if isinstance(tokens, list) else 0,
        _cache(settings.fields),
        shape is None or shape.cached,
        opened,
    )


def _shape(fields: Mapping[str, Any]) -> CacheShape | None:
    try:
        return read_shape(fields)
    except TBQError:
        return None


def _cache(fields: Mapping[str, Any]) -> Cache | None:
    shape = _shape(fields)
    if shape is None:
        return None
    return [
        (layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size)
        for layer in shape.layers
        if layer.kind == GLOBAL
    ]


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file.  For the first file of a split model: of all its files, one after the other."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    digest, files = hashlib.sha256(), [path]
    part = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if part:
        files = [path.with_name(f"{part[1]}-{i:05}-of-{part[2]}.gguf") for i in range(1, int(part[2]) + 1)]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, desc="sha256", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in files:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    digest.update(piece)
                    bar.update(len(piece))
    return digest.hexdigest()
