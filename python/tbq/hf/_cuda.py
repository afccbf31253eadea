# SPDX-License-Identifier: MIT
"""The Triton kernels' launches.  Everything here takes torch tensors on one CUDA device; nothing imports libtbq.

Packed tensors are uint8 (batch, tokens, KV heads, bytes of a head) with the last two axes contiguous.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton

from tbq.hf import _kernels, _tables
from tbq.hf._tables import BLOCK_BYTES

#: Largest head size that `attend` takes, in blocks of 64.
MOST_BLOCKS = 4


@functools.cache
def tables(bits: int, device: torch.device) -> torch.Tensor:
    """Signs, levels, gaps to the next and to the last level, bytes of level + 64, thresholds; float32 but for the bytes, at the
    offsets of _kernels."""
    levels = _tables.LEVELS[bits]
    gaps = [b - a for a, b in zip(levels, levels[1:])]

    def padded(values: Sequence[float]) -> list[float]:
        return [*values, *[0] * (16 - len(values))]

    numbers = torch.tensor(
        [*_tables.SIGNS, *padded(levels), *padded([*gaps, 0]), *padded([0, *gaps])], dtype=torch.float32
    )
    codebook = torch.tensor([64 + level for level in levels] + [0] * (16 - len(levels)), dtype=torch.uint8).view(
        torch.float32
    )
    thresholds = torch.tensor([t for row in _tables.THRESHOLDS[bits] for t in row], dtype=torch.float32)
    return torch.cat([numbers, codebook, thresholds]).to(device)


@functools.cache
def transforms(bits: int, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """(2, 64, 64): value c of a block is the sum over e of its levels, in the order of _kernels.element(), times [0, c, e], and
    times d; queries go the other way.  [1]: values 0, 2, 4, ... 62, 1, 3, ... 63."""
    hadamard = torch.ones((1, 1))
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    natural = torch.tensor(_tables.SIGNS)[:, None] * hadamard[:, _kernels.element.fn(torch.arange(64), bits)] * 0.125
    return torch.stack([natural, natural[[*range(0, 64, 2), *range(1, 64, 2)]]]).to(dtype).to(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on torch's current device, which with a model spread over several need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _side(bits: int, size: int) -> tuple[int, int, int, int]:
    """Bits, scales of the search, blocks of a head, bytes of a block; constants of a kernel."""
    return (bits, len(_tables.THRESHOLDS[bits]), size // 64, BLOCK_BYTES[bits]) if bits else (0, 0, 1, 2)


def encode(
    k: torch.Tensor,
    k_packed: torch.Tensor | None,
    k_bits: int,
    v: torch.Tensor,
    v_packed: torch.Tensor | None,
    v_bits: int,
    half: int = 0,
) -> None:
    """k, v: (batch, heads, tokens, size), any float dtype, last axis contiguous, into the packed tensors of as many tokens.

    Bits of 0 leave a side out.  half: of the first 2 half channels of keys, c and c + half are stored as neighbors.
    The bytes are libtbq's (tbq_quantize_kv).
    """
    batch, heads, tokens, k_size = k.shape
    v_size = v.shape[-1]
    k_side, v_side = _side(k_bits, k_size), _side(v_bits, v_size)
    rows = batch * heads * tokens
    k_total, v_total = (rows * k_side[2] if k_bits else 0), (rows * v_side[2] if v_bits else 0)
    n = (
        1 if k.is_cuda else 8
    )  # a block to a program of one warp; Triton's interpreter takes one program after the other
    with _on(k.device):
        _kernels.encode[(-(-k_total // n) + -(-v_total // n),)](
            k,
            *k.stride()[:3],
            k_packed,
            *(k_packed.stride()[:2] if k_packed is not None else (0, 0)),
            k_total,
            tables(k_bits or v_bits, k.device),
            v,
            *v.stride()[:3],
            v_packed,
            *(v_packed.stride()[:2] if v_packed is not None else (0, 0)),
            v_total,
            tables(v_bits or k_bits, k.device),
            heads,
            tokens,
            *k_side,
            *v_side,
            half,
            n,
            num_warps=1,
            enable_fp_fusion=False,
        )


def decode(
    k_packed: torch.Tensor | None,
    k_bits: int,
    k_size: int,
    v_packed: torch.Tensor | None,
    v_bits: int,
    v_size: int,
    dtype: torch.dtype,
    half: int = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The values, (batch, heads, tokens, size) in dtype, contiguous; None for a side of 0 bits.  half: as it was encoded."""
    some = k_packed if k_packed is not None else v_packed
    assert some is not None
    batch, tokens, heads, _ = some.shape
    k = torch.empty((batch, heads, tokens, k_size), dtype=dtype, device=some.device) if k_bits else None
    v = torch.empty((batch, heads, tokens, v_size), dtype=dtype, device=some.device) if v_bits else None
    n = 64
    k_side, v_side = _side(k_bits, k_size), _side(v_bits, v_size)
    programs = -(-tokens // n) * batch * heads
    k_programs, v_programs = (programs * side[2] if side[0] else 0 for side in (k_side, v_side))
    with _on(some.device):
        _kernels.decode[(k_programs + v_programs,)](
            k_packed,
            *(k_packed.stride()[:2] if k_packed is not None else (0, 0)),
            k,
            tables(k_bits or v_bits, some.device),
            transforms(k_bits or v_bits, some.device),
            v_packed,
            *(v_packed.stride()[:2] if v_packed is not None else (0, 0)),
            v,
            tables(v_bits or k_bits, some.device),
            transforms(v_bits or k_bits, some.device),
            heads,
            tokens,
            k_programs,
            k_bits,
            *k_side[2:],
            v_bits,
            *v_side[2:],
            half,
            n,
            num_warps=4,
        )
    return k, v


def attention(
    query: torch.Tensor,
    k_packed: torch.Tensor,
    k_bits: int,
    v_packed: torch.Tensor,
    v_bits: int,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    half: int = 0,
) -> torch.Tensor:
    """Attention straight from blocks.

    query: (batch, query heads, tokens, key size), last axis contiguous.  mask: bool (True is seen) or an addend, of shape
    (batch or 1, heads or 1, tokens or 1, at least the cached tokens).  causal: the last query token sees everything, the one
    before it one key less, ...  sinks: a logit for each query head.  half: as the keys were encoded.
    Returns (batch, tokens, query heads, value size) in the query's dtype.
    """
    batch, q_heads, tokens, k_size = query.shape
    n_kv, heads = k_packed.shape[1:3]
    group = q_heads // heads
    k_blocks, v_blocks = k_size // 64, v_packed.shape[3] // BLOCK_BYTES[v_bits]
    device = query.device
    if not n_kv or not tokens:
        return torch.zeros((batch, tokens, q_heads, v_blocks * 64), dtype=query.dtype, device=device)
    m, keys, warps, programs = _tile(group * tokens, max(k_blocks, v_blocks))
    rows = triton.next_power_of_2(min(group * tokens, m))
    tiles = -(-group * tokens // m)
    chunk = _chunk(n_kv, batch * heads * tiles, keys, programs * _processors(device))
    chunks = -(-n_kv // chunk)
    partial = torch.empty(
        batch * heads * tiles * chunks * rows * (v_blocks * 64 + 2), dtype=torch.float32, device=device
    )
    out = torch.empty((batch, tokens, q_heads, v_blocks * 64), dtype=query.dtype, device=device)
    strides: tuple[int, ...] = (0, 0, 0)
    kind = 0  # of the mask
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3]))
        mask = mask.view(torch.uint8) if kind == 1 else mask
    with _on(device):
        _kernels.attend[(tiles, batch * heads, chunks)](
            query,
            *query.stride()[:3],
            k_packed,
            *k_packed.stride()[:2],
            tables(k_bits, device),
            transforms(k_bits, device, query.dtype),
            v_packed,
            *v_packed.stride()[:2],
            tables(v_bits, device),
            mask,
            *strides,
            partial,
            _counters(batch * heads * tiles, device),
            out,
            *out.stride()[:2],
            sinks,
            heads,
            tokens,
            n_kv,
            chunk,
            chunks,
            scale,
            softcap,
            group,
            k_bits,
            k_blocks,
            BLOCK_BYTES[k_bits],
            v_bits,
            v_blocks,
            BLOCK_BYTES[v_bits],
            kind,
            causal and tokens > 1,
            softcap != 0.0,
            sinks is not None,
            half,
            m,
            rows,
            keys,
            num_warps=warps,
            num_stages=1,
        )
    return out


def _counters(n: int, device: torch.device) -> torch.Tensor:
    """n zeros, for which `attend` leaves zeros behind, so that they are made once.  One tensor for each stream, since launches
    on one stream do not overlap."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _zeros(-(-n // 1024) * 1024, device, stream)


@functools.cache
def _zeros(n: int, device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def _tile(rows: int, blocks: int) -> tuple[int, int, int, int]:
    """Query rows and keys of a tile, warps of a program and programs of a multiprocessor, as many as its registers hold.  Up to
    16 rows the fastest of those in docs/hf.md; above, nothing was compared: tiles of 64 rows spill registers, and
    Triton 3.6 does not compile them for values of 3 bits."""
    if rows > 16:
        return (32, 64, 4, 2) if blocks <= 2 else (32, 32, 4, 2)
    return {1: (16, 64, 2, 4), 2: (16, 64, 4, 2)}.get(blocks, (16, 32, 4, 2))


def _chunk(n_kv: int, parts: int, keys: int, programs: int) -> int:
    """Cached tokens of a program: enough for `programs` of them, none with less than a tile of keys."""
    tiles = -(-n_kv // keys)
    return -(-tiles // min(max(1, programs // parts), tiles)) * keys


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return os.cpu_count() or 1
    return torch.cuda.get_device_properties(device).multi_processor_count
