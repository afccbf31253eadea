# SPDX-License-Identifier: MIT
"""The kernels for CUDA: launches of the Triton kernels.

All tensors of a call are on one device.  This module does not need libtbq.

_backend.Backend documents the functions and the shapes.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from tbq.hf import _kernels, _tables
from tbq.hf._buffers import BLOCK_BYTES, EXACT, ExactRows

#: Largest head size that `attend` takes, in blocks of 64.
MOST_BLOCKS = 4


@functools.cache
def tables(bits: int, device: torch.device) -> torch.Tensor:
    """Returns the tables of a kernel, at the offsets of _kernels.

    They are the signs, the levels, the gaps to the next and to the previous level, bytes with level + 64, and the
    thresholds.  All but the bytes are float32.  8 bits have signs only.
    """
    levels = _tables.LEVELS.get(bits, ())
    gaps = [b - a for a, b in itertools.pairwise(levels)]

    def padded(values: Sequence[float]) -> list[float]:
        return [*values, *[0] * (16 - len(values))]

    numbers = torch.tensor(
        [*_tables.SIGNS, *padded(levels), *padded([*gaps, 0]), *padded([0, *gaps])], dtype=torch.float32
    )
    codebook = torch.tensor([64 + level for level in levels] + [0] * (16 - len(levels)), dtype=torch.uint8).view(
        torch.float32
    )
    thresholds = torch.tensor([t for row in _tables.THRESHOLDS.get(bits, ()) for t in row], dtype=torch.float32)
    return torch.cat([numbers, codebook, thresholds]).to(device)


@functools.cache
def transforms(bits: int, device: torch.device, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Returns the matrices that rotate back, (2, 64, 64).

    Value c of a block is d times the sum over e of [0, c, e] times level e, in the order of _kernels.element().
    Queries are multiplied with the transposed matrix.  [1] has the rows 0, 2, 4, ... 62, 1, 3, ... 63 of [0].
    """
    hadamard = torch.ones((1, 1))
    for _ in range(6):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    natural = torch.tensor(_tables.SIGNS)[:, None] * hadamard[:, _kernels.element.fn(torch.arange(64), bits)] * 0.125
    return torch.stack([natural, natural[[*range(0, 64, 2), *range(1, 64, 2)]]]).to(dtype).to(device)


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, where Triton launches.  A model may be spread over several devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _tensor_constants(bits: int, size: int) -> tuple[int, int, int, int]:
    """Returns constants of a kernel: bits, scales of the search, blocks of a head, bytes of a block."""
    return (bits, len(_tables.THRESHOLDS.get(bits, ())), size // 64, BLOCK_BYTES[bits]) if bits else (0, 0, 1, 2)


def encode(
    k: torch.Tensor,
    k_packed: torch.Tensor | None,
    k_bits: int,
    v: torch.Tensor,
    v_packed: torch.Tensor | None,
    v_bits: int,
    half: int = 0,
    mean: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Backend.encode.  k and v may have any float dtype; their last axis is contiguous.

    The bytes are those of libtbq's tbq_quantize_kv, and of its tbq_quantize for exact rows.
    """
    batch, heads, tokens, k_size = k.shape
    v_size = v.shape[-1]
    k_constants, v_constants = _tensor_constants(k_bits, k_size), _tensor_constants(v_bits, v_size)
    rows = batch * heads * tokens
    k_total, v_total = (rows * k_constants[2] if k_bits else 0), (rows * v_constants[2] if v_bits else 0)
    # one block for a program of one warp; more in Triton's interpreter, which runs one program after the other
    n = 1 if k.is_cuda else 8
    with _current_device(k.device):
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
            mean,
            weight,
            mean is not None,
            weight is not None and k_bits != EXACT,
            *k_constants,
            *v_constants,
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
    """Backend.decode.  The results are contiguous."""
    some = k_packed if k_packed is not None else v_packed
    assert some is not None
    batch, tokens, heads, _ = some.shape
    k = torch.empty((batch, heads, tokens, k_size), dtype=dtype, device=some.device) if k_bits else None
    v = torch.empty((batch, heads, tokens, v_size), dtype=dtype, device=some.device) if v_bits else None
    n = 64
    k_constants, v_constants = _tensor_constants(k_bits, k_size), _tensor_constants(v_bits, v_size)
    programs = -(-tokens // n) * batch * heads
    k_programs, v_programs = (programs * tensor[2] if tensor[0] else 0 for tensor in (k_constants, v_constants))
    with _current_device(some.device):
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
            *k_constants[2:],
            v_bits,
            *v_constants[2:],
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
    k_exact: ExactRows | None = None,
    v_exact: ExactRows | None = None,
    k_mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Backend.attention.  The last axis of query is contiguous."""
    batch, q_heads, tokens, k_size = query.shape
    n_kv, heads = k_packed.shape[1:3]
    group = q_heads // heads
    k_blocks, v_blocks = k_size // 64, v_packed.shape[3] // BLOCK_BYTES[v_bits]
    device = query.device
    if not n_kv or not tokens:
        return torch.zeros((batch, tokens, q_heads, v_blocks * 64), dtype=query.dtype, device=device)
    m, keys, warps, programs = _tile_shape(group * tokens, max(k_blocks, v_blocks))
    rows = triton.next_power_of_2(min(group * tokens, m))
    tiles = -(-group * tokens // m)
    parts = _parts(k_packed, k_bits, v_packed, v_bits, k_exact, v_exact)
    chunk = [
        _chunk_size(part.n, batch * heads * tiles, keys, programs * _count_multiprocessors(device)) for part in parts
    ]
    chunks = [-(-part.n // size) for part, size in zip(parts, chunk)]
    partial = torch.empty(
        batch * heads * tiles * sum(chunks) * rows * (v_blocks * 64 + 2), dtype=torch.float32, device=device
    )
    out = torch.empty((batch, tokens, q_heads, v_blocks * 64), dtype=query.dtype, device=device)
    strides: tuple[int, ...] = (0, 0, 0)
    mask_kind = 0
    if mask is not None:
        mask_kind = 1 if mask.dtype == torch.bool else 2
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3]))
        mask = mask.view(torch.uint8) if mask_kind == 1 else mask
    counters = _counters(batch * heads * tiles, device)
    with _current_device(device):
        for i, part in enumerate(parts):
            _kernels.attend[(tiles, batch * heads, chunks[i])](
                query,
                *query.stride()[:3],
                part.k,
                *part.k.stride()[:2],
                tables(part.k_bits, device),
                transforms(part.k_bits, device, query.dtype),
                part.v,
                *part.v.stride()[:2],
                tables(part.v_bits, device),
                mask[..., part.at :] if mask is not None else None,
                *strides,
                partial,
                counters,
                out,
                *out.stride()[:2],
                sinks,
                k_mean,
                heads,
                tokens,
                part.n,
                n_kv - tokens - part.at,
                chunk[i],
                sum(chunks),
                sum(chunks[:i]),
                *part.places,
                scale,
                softcap,
                group,
                part.k_bits,
                k_blocks,
                BLOCK_BYTES[part.k_bits],
                part.v_bits,
                v_blocks,
                BLOCK_BYTES[part.v_bits],
                mask_kind,
                causal and tokens > 1 and (part.v_bits == EXACT or part.at + part.n > n_kv - tokens + 1),
                softcap != 0.0,
                sinks is not None,
                k_mean is not None,
                half,
                m,
                rows,
                keys,
                num_warps=warps,
                num_stages=1,
            )
    return out


class _Part(NamedTuple):
    """What one launch of `attend` reads: packed rows, or exact ones."""

    k: torch.Tensor
    k_bits: int
    v: torch.Tensor
    v_bits: int
    n: int  #: rows, or slots
    at: int = 0  #: the cached row that is the first of k and v
    places: tuple[int, int, int] = (0, 0, 0)  #: n_first, newest and shift of `attend`


def _parts(
    k: torch.Tensor, k_bits: int, v: torch.Tensor, v_bits: int, k_exact: ExactRows | None, v_exact: ExactRows | None
) -> list[_Part]:
    """The packed rows between the exact ones, if there are any, and the exact ones."""
    n_kv = k.shape[1]
    if k_exact is None or v_exact is None:
        return [_Part(k, k_bits, v, v_bits, n_kv)]
    slots, first, newest = k_exact
    shift = k_exact.cell_shift(n_kv)
    exact = _Part(slots, EXACT, v_exact.slots, EXACT, slots.shape[1], 0, (first, newest, shift))
    last = n_kv - k_exact.n_newest
    packed = [_Part(k[:, first:last], k_bits, v[:, first:last], v_bits, last - first, first)] if first < last else []
    return [*packed, exact]


def _counters(n: int, device: torch.device) -> torch.Tensor:
    """Returns n zeros.  `attend` leaves zeros there, so they are made once.

    Each stream has its own tensor, because only launches on one stream never overlap.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _zeros(-(-n // 1024) * 1024, device, stream)


@functools.cache
def _zeros(n: int, device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def _tile_shape(rows: int, blocks: int) -> tuple[int, int, int, int]:
    """Returns query rows and keys of a tile, warps of a program, and programs that a multiprocessor's registers hold.

    Up to 16 rows, it is the fastest tile of docs/measurements/hf.md.  Above, no others were compared: tiles of 64 rows
    spill registers, and Triton 3.6 does not compile them for values of 3 bits.
    """
    if rows > 16:
        return (32, 64, 4, 2) if blocks <= 2 else (32, 32, 4, 2)
    return {1: (16, 64, 2, 4), 2: (16, 64, 4, 2)}.get(blocks, (16, 32, 4, 2))


def _chunk_size(n_kv: int, parts: int, keys: int, programs: int) -> int:
    """Returns the cached tokens of a program: a multiple of a tile's keys, for about `programs` programs in all."""
    tiles = -(-n_kv // keys)
    return -(-tiles // min(max(1, programs // parts), tiles)) * keys


@functools.cache
def _count_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return os.cpu_count() or 1
    return torch.cuda.get_device_properties(device).multi_processor_count
