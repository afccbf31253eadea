# SPDX-License-Identifier: MIT
"""Reads center files, which hold the means of a model's keys by layer."""

import dataclasses
import hashlib
import os
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tbq.errors import TBQError
from tbq.gguf_files.reader import Tensor, open_gguf

_SAMPLE = 64  # bytes that a fingerprint reads at each end of a tensor


@dataclasses.dataclass(frozen=True)
class Center:
    """What a center file holds.  means[layer], energies[layer]: float32 (KV heads, head size)."""

    model: str  #: fingerprint of the model
    architecture: str
    context: int  #: tokens of context that the keys were measured over
    tokens: int  #: number of keys measured in each layer
    hash: str  #: hash of everything in the file; saved states of a cache name it
    means: dict[int, npt.NDArray[np.float32]]
    energies: dict[int, npt.NDArray[np.float32]]  #: mean squares of the queries that read these keys
    shares: dict[int, float]  #: share of the energy of a layer's keys that their mean holds, 0 to 1


def fingerprint(model: str | os.PathLike[str]) -> str:
    """The hash that says which model a center belongs to, in hexadecimal.

    It is the SHA-256 of the names, types, shapes, and first and last bytes of all tensors.  Metadata and the split into
    files do not change it.  ggml_tbq/llama/ computes the same hash.
    Raises TBQError if the file is not a model, OSError if it cannot be read.
    """
    digest = hashlib.sha256()
    files = {}
    try:
        for tensor in sorted(open_gguf(model).tensors, key=lambda tensor: tensor.name.encode()):
            ne = [*reversed(tensor.shape), 1, 1, 1][:4]
            digest.update(f"{tensor.name} {int(tensor.type)} {ne[0]} {ne[1]} {ne[2]} {ne[3]}\n".encode())
            if tensor.path not in files:
                files[tensor.path] = tensor.path.open("rb")
            n = min(_SAMPLE, tensor.n_bytes)
            for start in (0, tensor.n_bytes - n):
                files[tensor.path].seek(tensor.offset + start)
                digest.update(files[tensor.path].read(n))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def _hash(center: Center, rope: Sequence[float], factors: Sequence[str]) -> str:
    """The hash of everything in a center, as ggml_tbq/llama/ computes it.

    rope, factors: in the order of the layers.
    """
    head = f"{center.model} {center.architecture} {center.context} {center.tokens}\n"
    digest, n_rope = hashlib.sha256(head.encode()), len(rope) // max(1, len(factors))
    for i, il in sorted(enumerate(center.means), key=lambda pair: pair[1]):
        heads, size = center.means[il].shape
        digest.update(f"{il} {size} {heads} {factors[i]}\n".encode())
        digest.update(struct.pack(f"<{n_rope + 1}f", *rope[i * n_rope : (i + 1) * n_rope], center.shares[il]))
        digest.update(center.means[il].tobytes())
        digest.update(center.energies[il].tobytes())
    return digest.hexdigest()


def _read_values(tensor: Tensor) -> npt.NDArray[np.float32]:
    return np.fromfile(tensor.path, "<f4", tensor.n_values, offset=tensor.offset).reshape(
        tensor.shape[-2:] if len(tensor.shape) > 1 else (1, -1)
    )


def read_center(path: str | os.PathLike[str]) -> Center:
    """The contents of a file of `tbq calibrate`, checked.  TBQError for another kind of file, or a corrupt one."""
    file = open_gguf(path)
    fields, by_name = file.metadata, {tensor.name: tensor for tensor in file.tensors}
    try:
        if fields["cache_center.version"] != 1:
            raise TBQError(f"{path} is of a newer version; update ggml-tbq")
        layers, shares = fields["cache_center.layers"], fields["cache_center.share"]
        rope, factors = fields["cache_center.rope"], fields["cache_center.rope_factors"]
        means = {il: _read_values(by_name[f"blk.{il}.attn_k.center"]) for il in layers}
        energies = {il: _read_values(by_name[f"blk.{il}.attn_q.energy"]) for il in layers}
        center = Center(
            fields["cache_center.model"],
            fields["cache_center.architecture"],
            fields["cache_center.n_ctx"],
            fields["cache_center.n_tokens"],
            fields["cache_center.hash"],
            means,
            energies,
            dict(zip(layers, shares, strict=True)),
        )
        found = _hash(center, rope, factors)
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        if isinstance(error, TBQError):
            raise
        raise TBQError(f"{path} holds no means of keys; tbq calibrate makes such a file") from None
    if found != center.hash:
        raise TBQError(f"{path} is corrupt; make it again with tbq calibrate")
    return center
