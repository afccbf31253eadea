# SPDX-License-Identifier: MIT
"""Launches of the Triton kernels over pages.  All tensors of a call are on one device; libtbq is not needed.

Pages: uint8 (pages, tokens of a page, KV heads, bytes of a slot), the last axis contiguous.  A slot is the blocks of a
key and then of a value.  Keys, values and queries: (tokens, heads, head size), the last axis contiguous.
"""

from typing import NamedTuple

import torch
import triton

from tbq.hf._buffers import BLOCK_BYTES
from tbq.hf._cuda import _count_multiprocessors, _current_device, _tensor_constants, tables, transforms
from tbq.vllm import _kernels

__all__ = ["Shape", "attend", "chunks_for", "counters", "store", "unpack"]


def _strides(pages: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    return pages, pages.stride(0), pages.stride(1), pages.stride(2)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    k_bits: int,
    v_bits: int,
    half: int = 0,
    mean: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Encodes keys and values to their slots, with the bytes of libtbq's tbq_quantize_kv.

    slots: int64 or int32 (tokens), page times tokens of a page plus place; negative: not stored.  Only the first
    slots.numel() tokens of k and v count.
    half, mean, weight: as of tbq.hf._backend.Backend.encode.
    """
    tokens, heads = slots.shape[0], k.shape[1]
    if not tokens:
        return
    k_constants, v_constants = _tensor_constants(k_bits, k.shape[2]), _tensor_constants(v_bits, v.shape[2])
    k_total, v_total = tokens * heads * k_constants[2], tokens * heads * v_constants[2]
    n = 1 if k.is_cuda else 8  # as in tbq.hf._cuda.encode
    with _current_device(k.device):
        _kernels.store[(-(-k_total // n) + -(-v_total // n),)](
            k,
            *k.stride()[:2],
            tables(k_bits, k.device),
            v,
            *v.stride()[:2],
            tables(v_bits, k.device),
            *_strides(pages),
            slots,
            heads,
            k_total,
            v_total,
            mean,
            weight,
            mean is not None,
            weight is not None,
            *k_constants,
            *v_constants,
            half,
            pages.shape[1],
            n,
            num_warps=1,
            enable_fp_fusion=False,
        )


def unpack(
    pages: torch.Tensor,
    table: torch.Tensor,
    first: int,
    k: torch.Tensor,
    v: torch.Tensor,
    k_bits: int,
    v_bits: int,
    half: int = 0,
    mean: torch.Tensor | None = None,
) -> None:
    """Decodes the tokens from `first` on of one sequence to k and v, (tokens, heads, head size), the last two axes
    contiguous.

    table: int32, the sequence's pages.  mean: float32 (heads, head size) in the channels' order, is added to keys.
    """
    tokens, heads, k_size = k.shape
    if not tokens:
        return
    k_blocks, v_blocks, n = k_size // 64, v.shape[2] // 64, 64
    with _current_device(k.device):
        _kernels.unpack[(-(-tokens // n), heads * (k_blocks + v_blocks))](
            *_strides(pages),
            table,
            first,
            tokens,
            heads,
            k,
            k.stride(0),
            tables(k_bits, k.device),
            transforms(k_bits, k.device),
            v,
            v.stride(0),
            tables(v_bits, k.device),
            transforms(v_bits, k.device),
            mean,
            mean is not None,
            k_bits,
            k_blocks,
            BLOCK_BYTES[k_bits],
            v_bits,
            v_blocks,
            BLOCK_BYTES[v_bits],
            half,
            pages.shape[1],
            n,
            num_warps=4,
        )


class Shape(NamedTuple):
    """How attend() is launched."""

    m: int  #: query rows of a tile
    keys: int  #: keys of a tile
    warps: int  #: of a program
    programs: int  #: of a multiprocessor
    ahead: bool  #: whether a tile is loaded before the tile before it is used


def tile_shape(rows: int, blocks: int) -> Shape:
    """rows: query rows of a KV head.  blocks: of 64 values in a key or value."""
    if rows > 16:
        return Shape(32, 64, 4, 2, False) if blocks <= 2 else Shape(32, 32, 4, 2, False)
    return {1: Shape(16, 64, 2, 4, True), 2: Shape(16, 64, 4, 2, True)}.get(blocks, Shape(16, 32, 4, 2, False))


def chunks_for(sequences: int, heads: int, rows: int, blocks: int, most_tokens: int, device: torch.device) -> int:
    """Returns in how many chunks attend() divides each sequence: a number that depends on no length, as CUDA graphs
    need.

    rows: query rows of a KV head, query tokens times query heads.  most_tokens: of any sequence.
    """
    m, keys, _, programs, _ = tile_shape(rows, blocks)
    others = sequences * heads * -(-rows // m)
    return max(1, min(programs * _count_multiprocessors(device) // max(1, others), -(-most_tokens // keys)))


def counters(n: int, device: torch.device) -> torch.Tensor:
    """Returns what attend() counts in: zeros for `n` sequences times KV heads times row tiles.

    Made outside of CUDA graphs, and used by one stream at a time.
    """
    return torch.zeros(n, dtype=torch.int32, device=device)


def attend(
    q: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    k_bits: int,
    v_bits: int,
    scale: float,
    most_rows: int,
    chunks: int,
    arrived: torch.Tensor,
    *,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    half: int = 0,
    mean: torch.Tensor | None = None,
    shape: Shape | None = None,
) -> None:
    """Attention of a few query tokens of each sequence to its pages, which hold their keys and values already.

    q, out: (tokens, query heads, head size), the last axis of q and the last two of out contiguous.  Sequence i has the
    query tokens starts[i] ... starts[i + 1] - 1, the newest of its lengths[i] tokens; both int32, starts with one more.
    table: int32 (sequences, pages).  most_rows: the most query tokens of a sequence.
    window: how many of the newest tokens a token sees, itself included; 0: all.
    mean: what was subtracted from the keys, in the order of storage; only soft-caps and sinks need it.
    chunks, arrived: of chunks_for() and counters().  shape: instead of tile_shape(), to measure others.
    """
    sequences, heads, q_heads = lengths.shape[0], pages.shape[2], q.shape[1]
    group = q_heads // heads
    k_blocks = q.shape[2] // 64
    v_blocks = out.shape[2] // 64
    rows = most_rows * group
    m, keys, warps, _, ahead = shape or tile_shape(rows, max(k_blocks, v_blocks))
    kept = triton.next_power_of_2(min(rows, m))
    tiles = -(-rows // m)
    partial = torch.empty(
        sequences * heads * tiles * chunks * kept * (v_blocks * 64 + 2), dtype=torch.float32, device=q.device
    )
    needs_mean = bool(softcap) or sinks is not None
    with _current_device(q.device):
        _kernels.attend[(tiles, sequences * heads, chunks)](
            q,
            *q.stride()[:2],
            starts,
            lengths,
            *_strides(pages),
            table,
            table.stride(0),
            tables(k_bits, q.device),
            transforms(k_bits, q.device, q.dtype),
            tables(v_bits, q.device),
            partial,
            arrived,
            out,
            out.stride(0),
            sinks,
            mean if needs_mean else None,
            heads,
            scale,
            softcap,
            window,
            group,
            k_bits,
            k_blocks,
            BLOCK_BYTES[k_bits],
            v_bits,
            v_blocks,
            BLOCK_BYTES[v_bits],
            most_rows > 1,
            window > 0,
            softcap != 0.0,
            sinks is not None,
            needs_mean and mean is not None,
            half,
            pages.shape[1],
            m,
            kept,
            keys,
            ahead,
            num_warps=warps,
            num_stages=1,
        )
