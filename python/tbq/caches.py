# SPDX-License-Identifier: MIT
"""Pairs of cache types, and what one token takes in a model's cache."""
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tbq._layers import GLOBAL, Shape, read_shape
from tbq._run import run
from tbq._settings import under
from tbq._types import block, types
from tbq._version import __version__
from tbq.errors import TBQError
from tbq.paths import paths, program

#: Values of a token's keys and of its values, layer by layer.
Cache = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TypePair:
    """The types of keys and values: TypePair("tbq4_0", "tbq3_0")."""

    k: str
    v: str
    centered: bool = False  #: keys are stored less their means (tbq.center)

    def __str__(self) -> str:
        return (self.k if self.k == self.v else f"{self.k}/{self.v}") + (" centred" if self.centered else "")

    @property
    def may_be_centered(self) -> bool:
        """Whether centring changes anything: keys of 16 bits and more are exact without it."""
        return self.k not in ("f32", "f16", "bf16")

    @property
    def ours(self) -> bool:
        """Whether a side is a tbq type."""
        return self.k in types or self.v in types

    @property
    def bits(self) -> tuple[float, float]:
        """Bits of a value of the keys, and of the values; scales included."""
        (k_values, k_bytes), (v_values, v_bytes) = block(self.k), block(self.v)
        return 8 * k_bytes / k_values, 8 * v_bytes / v_values

    def bytes(self, cache: Cache) -> int:
        """Bytes of one token in all layers."""
        (k_values, k_bytes), (v_values, v_bytes) = block(self.k), block(self.v)
        return sum(k // k_values * k_bytes + v // v_values * v_bytes for k, v in cache)


def known() -> list[str]:
    """The cache types that this llama.cpp takes, in the order of its help."""
    done = run("llama-perplexity", ["--help"])
    found = re.search(r"--cache-type-k TYPE.*?allowed values: (.*?)\(default", done.stdout, re.S)
    if not found:
        raise TBQError(f"{program('llama-perplexity')} --help names no cache types; is it the patched one?")
    return found[1].replace(",", " ").split()


def split_pair(text: str) -> tuple[str, str]:
    """("tbq4_0", "tbq3_0") of "tbq4_0/tbq3_0"; one name is for both sides."""
    k, slash, v = text.partition("/")
    return k, v if slash else k


def parse(text: str) -> list[TypePair]:
    """The pairs of "f16,tbq4_0/tbq3_0": keys / values, one name for both; TBQError for an unknown type."""
    names, pairs = known(), []
    for part in filter(None, text.split(",")):
        pair = TypePair(*split_pair(part))
        for name in (pair.k, pair.v):
            if name not in names:
                raise TBQError(f"cache type {name!r} is not one of {', '.join(names)}; a pair is K/V, as in tbq4_0/tbq3_0")
        pairs.append(pair)
    if not pairs:
        raise TBQError("no cache types; f16,tbq4_0 would compare two")
    return list(dict.fromkeys(pairs))


# --- models -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """What measuring needs of a GGUF file's metadata."""

    path: pathlib.Path
    context: int  #: tokens that it was trained for, or that RoPE is scaled to; 0 if the file does not say
    vocab: int  #: tokens of the tokenizer, 0 without one
    cache: Cache | None  #: without sliding windows, which do not grow with the text; None if llama.cpp's cache is not known here
    cached: bool = True  #: False if it keeps no keys and values (bert, mamba)

    def check_cached(self) -> None:
        """TBQError if there are no cache types to compare."""
        if not self.cached:
            raise TBQError(f"model {str(self.path)!r} keeps no keys and values, so there are no cache types to compare")


def read_model(path: pathlib.Path, options: Sequence[str] = ()) -> Model:
    """The Model of a GGUF file, or of the first part of a split one; TBQError if it is none or damaged.

    options: llama.cpp's; --override-kv and those of RoPE count.
    """
    from tbq.gguf_files import open_gguf

    fields = open_gguf(path).metadata
    fields.integer(f"{fields.get('general.architecture')}.context_length", 0)
    settings, tokens = under(fields, options), fields.get("tokenizer.ggml.tokens")
    shape = _shape(settings.fields)
    return Model(path, settings.reach, len(tokens) if isinstance(tokens, list) else 0, _cache(settings.fields), shape is None or shape.cached)


def _shape(fields: Mapping[str, Any]) -> Shape | None:
    try:
        return read_shape(fields)
    except TBQError:
        return None


def _cache(fields: Mapping[str, Any]) -> Cache | None:
    shape = _shape(fields)
    if shape is None:
        return None
    return [(layer.kv_heads * layer.key_size, layer.kv_heads * layer.value_size) for layer in shape.layers if layer.kind == GLOBAL]


def sha256(path: pathlib.Path) -> str:
    """Of a file; of a split model's parts one after the other, given the first."""
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


def versions() -> dict[str, str]:
    """What was measured with."""
    return {"tbq": __version__, "llama_cpp_commit": paths()["llama_cpp_commit"]}
