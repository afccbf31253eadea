# SPDX-License-Identifier: MIT
"""The C kernels over torch tensors in main memory; the same functions as _cuda, with libtbq's threads on our side.

Packed tensors are uint8 (batch, tokens, KV heads, bytes of a head) with the last two axes contiguous.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tbq._ffi import ffi, lib
from tbq._types import types
from tbq.errors import TBQError

if TYPE_CHECKING:
    pass

#: Blocks of a head that attention() takes: any number.
MOST_BLOCKS = 1 << 16
#: Fewer values than this are not worth waking a thread for: some 100 us of encoding, 30 of decoding.
_ALONE = 1 << 15
#: Values decoded at a time where a copy follows: they stay in the cache of a core.
_PIECE = 1 << 18
#: Query tokens whose mask is made at a time: bounds its memory.
_MASK_TOKENS = 256


def encode(
    k: torch.Tensor,
    k_packed: torch.Tensor | None,
    k_bits: int,
    v: torch.Tensor,
    v_packed: torch.Tensor | None,
    v_bits: int,
    half: int = 0,
) -> None:
    """k, v: (batch, heads, tokens, size), any float dtype, into the packed tensors of as many tokens; bits of 0 leave a side out.

    half: of the first 2 half channels of keys, c and c + half are stored as neighbors.
    """
    if k_bits and k_packed is not None:
        _encode(k.index_select(3, _order(k.shape[3], half)) if half else k, k_packed, k_bits)
    if v_bits and v_packed is not None:
        _encode(v, v_packed, v_bits)


@functools.cache
def _order(size: int, half: int) -> torch.Tensor:
    """The channels of a head as they are stored."""
    paired = torch.arange(2 * half).reshape(2, half).T.reshape(-1)
    return torch.cat([paired, torch.arange(2 * half, size)])


def _encode(states: torch.Tensor, packed: torch.Tensor, bits: int) -> None:
    half = states.dtype == torch.float16
    rows = states.transpose(1, 2).to(torch.float16 if half else torch.float32).contiguous()
    target = packed if packed.is_contiguous() else torch.empty_like(packed, memory_format=torch.contiguous_format)
    function, ctype = (lib.tbq_quantize_kv_f16, "uint16_t *") if half else (lib.tbq_quantize_kv, "float *")
    info = types[f"tbq{bits}_0"]

    def part(first: int, last: int) -> None:
        source = ffi.cast(ctype, rows.data_ptr() + first * 64 * rows.element_size())
        _check(
            function(
                info.id, source, ffi.cast("void *", target.data_ptr() + first * info.block_bytes), (last - first) * 64
            )
        )

    _in_parts(part, rows.numel() // 64)
    if target is not packed:
        packed.copy_(target)


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
    """The values, (batch, heads, tokens, size) in dtype; None for a side of 0 bits.  half: as it was encoded."""
    return (
        _decode(k_packed, k_bits, k_size, dtype, half) if k_bits and k_packed is not None else None,
        _decode(v_packed, v_bits, v_size, dtype, 0) if v_bits and v_packed is not None else None,
    )


def _decode(packed: torch.Tensor, bits: int, size: int, dtype: torch.dtype, half: int) -> torch.Tensor:
    batch, tokens, heads, _ = packed.shape
    made = torch.float16 if dtype == torch.float16 else torch.float32  # by the library
    values = torch.empty((batch, tokens, heads, size), dtype=dtype)
    if made == dtype and not half:
        for rows, target in zip(packed, values):  # contiguous in each
            _decode_rows(rows, bits, target)
        return values.transpose(1, 2)
    step = max(1, min(tokens, _PIECE // (heads * size)))
    buffer = torch.empty((step, heads, size), dtype=made)
    for rows, targets in zip(packed, values):
        for first in range(0, tokens, step):
            target = targets[first : first + step]
            piece = buffer[: target.shape[0]]
            _decode_rows(rows[first : first + step], bits, piece)
            if half:
                shape = target.shape[0], heads, half, 2
                target[..., : 2 * half].view(*shape[:2], 2, half).copy_(
                    piece[..., : 2 * half].view(shape).transpose(2, 3)
                )
            target[..., 2 * half :] = piece[..., 2 * half :]
    return values.transpose(1, 2)


def _decode_rows(rows: torch.Tensor, bits: int, values: torch.Tensor) -> None:
    """Contiguous blocks to contiguous float32 or float16."""
    function, ctype = (
        (lib.tbq_dequantize_f16, "uint16_t *") if values.dtype == torch.float16 else (lib.tbq_dequantize, "float *")
    )
    info = types[f"tbq{bits}_0"]

    def part(first: int, last: int) -> None:
        to = ffi.cast(ctype, values.data_ptr() + first * 64 * values.element_size())
        _check(
            function(info.id, ffi.cast("void *", rows.data_ptr() + first * info.block_bytes), to, (last - first) * 64)
        )

    _in_parts(part, values.numel() // 64)


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
    """Attention straight from blocks (tbq-attention.h).

    query: (batch, query heads, tokens, key size).  mask: bool (True is seen) or an addend, of shape (batch or 1, heads or 1,
    tokens or 1, at least the cached tokens).  causal: the last query token sees everything, the one before it one key less, ...
    sinks: a logit for each query head.  half: as the keys were encoded.  Returns (batch, tokens, query heads, value size) in the query's dtype.
    """
    batch, heads, tokens, _ = query.shape
    n_kv = k_packed.shape[1]
    v_size = v_packed.shape[3] // types[f"tbq{v_bits}_0"].block_bytes * 64
    rows = query.to(torch.float32)
    rows = rows.index_select(3, _order(rows.shape[3], half)) if half else rows
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    logits = None if sinks is None else sinks.to(torch.float32).contiguous()
    out = torch.empty((batch, tokens, heads, v_size), dtype=torch.float32)
    # pieces: what the C side sees is one problem, whose mask would take tokens . n_kv halves
    step = tokens if mask is None and not causal else _MASK_TOKENS
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        seen = n_kv - tokens + last if causal else n_kv
        part = torch.empty((batch, last - first, heads, v_size), dtype=torch.float32) if last - first < tokens else out
        _attention(
            rows[:, :, first:last],
            k_packed[:, :seen],
            k_bits,
            v_packed[:, :seen],
            v_bits,
            scale,
            _halves(mask, first, last, seen, causal, n_kv - tokens),
            softcap,
            logits,
            part,
        )
        if part is not out:
            out[:, first:last] = part
    return out.to(query.dtype)


def _halves(
    mask: torch.Tensor | None, first: int, last: int, seen: int, causal: bool, before: int
) -> torch.Tensor | None:
    """The mask of some query tokens as halves to add, or None; `before` tokens precede the queries."""
    added = None
    if mask is not None:
        some = (mask[:, :, first:last] if mask.shape[2] > 1 else mask)[..., :seen]
        added = (
            torch.zeros(some.shape, dtype=torch.float16).masked_fill_(~some, -torch.inf)
            if some.dtype == torch.bool
            else some.to(torch.float16)
        )
    if causal and last - first > 1:
        hidden = torch.full((last - first, seen), -torch.inf, dtype=torch.float16).triu_(before + first + 1)
        added = hidden[None, None] if added is None else added + hidden
    return None if added is None else added.contiguous()


def _attention(
    query: torch.Tensor,
    k: torch.Tensor,
    k_bits: int,
    v: torch.Tensor,
    v_bits: int,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    a = ffi.new("tbq_attention *")
    a.n_streams, a.n_head, a.n_tokens, a.k_size = query.shape
    a.n_kv, a.n_head_kv, a.v_size = k.shape[1], k.shape[2], out.shape[3]
    a.q = ffi.cast("float *", query.data_ptr())
    a.q_stream_stride, a.q_head_stride, a.q_token_stride = (4 * stride for stride in query.stride()[:3])
    for side, packed, bits in ((a.k, k, k_bits), (a.v, v, v_bits)):
        side.type, side.data, side.n_streams = (
            types[f"tbq{bits}_0"].id,
            ffi.cast("void *", packed.data_ptr()),
            packed.shape[0],
        )
        side.stream_stride, side.row_stride, side.head_stride = packed.stride()[:3]
    if mask is not None:
        a.mask, a.mask_n_streams, a.mask_n_heads = ffi.cast("uint16_t *", mask.data_ptr()), mask.shape[0], mask.shape[1]
        a.mask_stream_stride, a.mask_head_stride, a.mask_token_stride = (2 * stride for stride in mask.stride()[:3])
        if mask.shape[2] == 1:
            a.mask_token_stride = 0
    if sinks is not None:
        a.sinks = ffi.cast("float *", sinks.data_ptr())
    a.scale, a.logit_softcap, a.out = scale, softcap, ffi.cast("float *", out.data_ptr())
    plan = ffi.new("tbq_attention_plan *")
    _check(lib.tbq_attention_make_plan(a, plan))

    threads = max(
        1, min(torch.get_num_threads(), plan.n_items, query.shape[0] * a.n_kv * a.n_head * a.n_tokens // 1024)
    )
    work = torch.empty(lib.tbq_attention_work_bytes(plan, threads), dtype=torch.uint8)
    memory, kernels = ffi.cast("void *", work.data_ptr()), lib.tbq_best_kernels()
    _on_threads(lambda thread: lib.tbq_attention_run_share(plan, kernels, thread, threads, memory), threads)
    if plan.n_chunks > 1:
        lib.tbq_attention_merge(plan, kernels, 0, plan.n_rows, memory)


def _in_parts(function: Callable[[int, int], None], n: int) -> None:
    """function(first, last) over n blocks, on as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), n * 64 // _ALONE))
    _on_threads(lambda i: function(n * i // threads, n * (i + 1) // threads), threads)


def _on_threads(function: Callable[[int], None], threads: int) -> None:
    """function(0) here and the others beside it; returns when all have, with the first one's error."""
    if threads == 1:
        return function(0)
    others = [_pool(os.getpid(), threads).submit(function, i) for i in range(1, threads)]
    try:
        function(0)
    finally:
        concurrent.futures.wait(others)
    for other in others:
        other.result()
    return None


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that wait; a process that was forked has none of its parent's."""
    return concurrent.futures.ThreadPoolExecutor(threads - 1, thread_name_prefix="tbq")


def _check(status: Any) -> None:
    if status != lib.TBQ_OK:
        raise TBQError(ffi.string(lib.tbq_status_text(status)).decode())
