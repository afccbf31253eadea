# SPDX-License-Identifier: MIT
"""A model for measurements of speed: the layers of a llama, with random weights."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError

Q8_0 = (32, 34)  # values and bytes of a block: a float16, then signed bytes


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """The shape of a model.

    The default is the model of docs/measurements/attention.md.  A token reads 153 MB of weights, so that on two cores
    attention takes most of the time from depth 4096 on.
    """

    layers: int = 8
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head_size: int = 128
    ff: int = 2816  #: width of the feed-forward network
    vocab: int = 32000

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items())

    def cache(self) -> list[tuple[int, int]]:
        """The number of values in a token's K and in its V tensor, layer by layer."""
        return [(self.kv_heads * self.head_size,) * 2] * self.layers

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """The name, rows and columns of each matrix."""
        yield "token_embd", self.vocab, self.width
        yield "output", self.vocab, self.width
        for i in range(self.layers):
            yield f"blk.{i}.attn_q", self.heads * self.head_size, self.width
            yield f"blk.{i}.attn_k", self.kv_heads * self.head_size, self.width
            yield f"blk.{i}.attn_v", self.kv_heads * self.head_size, self.width
            yield f"blk.{i}.attn_output", self.width, self.heads * self.head_size
            yield f"blk.{i}.ffn_gate", self.ff, self.width
            yield f"blk.{i}.ffn_up", self.ff, self.width
            yield f"blk.{i}.ffn_down", self.width, self.ff

    def norms(self) -> Iterator[str]:
        """The names of the norms."""
        yield "output_norm"
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm"
            yield f"blk.{i}.ffn_norm"

    def size(self) -> int:
        """Bytes of the matrices, which take nearly all of the file."""
        return sum(rows * columns for _, rows, columns in self.matrices()) // Q8_0[0] * Q8_0[1]


def parse_shape(text: str) -> RandomModel:
    """The shape that a text such as "layers=32,width=4096" names.  Fields that it does not name keep their defaults.

    Raises TBQError for anything else.
    """
    fields: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in RandomModel.__dataclass_fields__ or not value.isascii() or not value.isdigit() or not int(value):
            raise TBQError(
                f"{part!r} is not one of {', '.join(RandomModel.__dataclass_fields__)}, '=' and a number above 0"
            )
        fields[key] = int(value)
    shape = RandomModel(**fields)
    for key, rule, kept in (
        ("width", "a multiple of 32", shape.width % 32 == 0),
        ("ff", "a multiple of 32", shape.ff % 32 == 0),
        ("head_size", "a multiple of 32", shape.head_size % 32 == 0),
        ("heads", f"a multiple of kv_heads, {shape.kv_heads}", shape.heads % shape.kv_heads == 0),
    ):
        if not kept:
            raise TBQError(f"{key}={getattr(shape, key)} must be {rule}")
    return shape


def write_random_model(path: pathlib.Path, shape: RandomModel, seed: int = 0) -> pathlib.Path:
    """Writes a llama with random Q8_0 weights and without a tokenizer; returns the path.

    Only one matrix at a time is in memory.
    """
    import gguf
    from tqdm import tqdm  # type: ignore[import-untyped]

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("shape only, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    one = np.ones(shape.width, np.float32)
    for name in shape.norms():
        writer.add_tensor_info(f"{name}.weight", one.shape, one.dtype, one.nbytes)
    for name, rows, columns in shape.matrices():
        row = columns // Q8_0[0] * Q8_0[1]
        writer.add_tensor_info(
            f"{name}.weight", (rows, row), np.dtype(np.uint8), rows * row, gguf.GGMLQuantizationType.Q8_0
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _ in shape.norms():
            writer.write_tensor_data(one)
        # making gigabytes of random numbers would take longer than the measurement, so all matrices use one pool,
        # rolled
        pool = np.random.default_rng(seed).integers(-127, 128, 1 << 25, np.int8)
        with tqdm(total=shape.size(), desc="random weights", unit="B", unit_scale=True, delay=2, leave=False) as bar:
            for i, (_, rows, columns) in enumerate(shape.matrices()):
                blocks = _random_blocks(np.roll(pool, 7919 * i), rows, columns)
                writer.write_tensor_data(blocks)
                bar.update(blocks.nbytes)
    finally:
        writer.close()
    return path


def _random_blocks(numbers: npt.NDArray[np.int8], rows: int, columns: int) -> npt.NDArray[np.uint8]:
    # uniform bytes have a standard deviation of 74; this d keeps outputs as large as inputs
    blocks = np.empty((rows, columns // Q8_0[0], Q8_0[1]), np.uint8)
    blocks[..., :2] = np.array([1 / (74 * columns**0.5)], "<f2").view(np.uint8)
    blocks[..., 2:] = np.resize(numbers, (rows, columns // Q8_0[0], Q8_0[0])).view(np.uint8)
    return blocks.reshape(rows, -1)
