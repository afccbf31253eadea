# SPDX-License-Identifier: MIT
"""The kernels for CPUs: libtbq's functions on torch tensors, divided over threads here.

_backend.Backend documents the functions and the shapes.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tbq._ffi import ffi, lib
from tbq._types import types
from tbq.errors import TBQError
from tbq.hf._buffers import BLOCK_BYTES, EXACT, ExactRows, channel_order

#: The largest head size that attention() takes, in blocks: more than any model has.
MOST_BLOCKS = 1 << 16
#: Values for each thread at least: encoding so many takes about 100 us, decoding 30 us.
_VALUES_PER_THREAD = 1 << 15
#: Values decoded at a time where a copy follows: they stay in the cache of a core.
_PIECE = 1 << 18
#: Rows of keys with weights that are encoded by one call.
_WEIGHTED_ROWS = 8
#: Query tokens whose mask is made at a time, which bounds its memory.
_MASK_TOKENS = 256


def _type_of(bits: int) -> int:
    """The library's number of the type of these bits."""
    return int(lib.TBQ_TYPE_TBQ8_0) if bits == EXACT else types[f"tbq{bits}_0"].id


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
    """Backend.encode.  k and v may have any float dtype."""
    if k_bits and k_packed is not None:
        stored = k.index_select(3, channel_order(k.shape[3], half)) if half else k
        if mean is not None:
            stored = stored.float() - mean[:, None]
        if weight is None or k_bits == EXACT:
            _encode(stored, k_packed, k_bits)
        else:
            _encode_weighted(stored, k_packed, k_bits, weight)
    if v_bits and v_packed is not None:
        _encode(v, v_packed, v_bits)


def _encode(states: torch.Tensor, packed: torch.Tensor, bits: int) -> None:
    is_f16 = states.dtype == torch.float16 and bits != EXACT
    rows = states.transpose(1, 2).to(torch.float16 if is_f16 else torch.float32).contiguous()
    target = packed if packed.is_contiguous() else torch.empty_like(packed, memory_format=torch.contiguous_format)
    function, ctype = (lib.tbq_quantize_kv_f16, "uint16_t *") if is_f16 else (lib.tbq_quantize_kv, "float *")
    if bits == EXACT:
        function = lib.tbq_quantize

    def part(first: int, last: int) -> None:
        source = ffi.cast(ctype, rows.data_ptr() + first * 64 * rows.element_size())
        to = ffi.cast("void *", target.data_ptr() + first * BLOCK_BYTES[bits])
        _check(function(_type_of(bits), source, to, (last - first) * 64))

    _run_in_parts(part, rows.numel() // 64)
    if target is not packed:
        packed.copy_(target)


def _encode_weighted(states: torch.Tensor, packed: torch.Tensor, bits: int, weight: torch.Tensor) -> None:
    """Encodes keys with weights for the error, some rows at a time: the library takes a weight for each value."""
    rows = states.transpose(1, 2).float().contiguous()
    target = packed if packed.is_contiguous() else torch.empty_like(packed, memory_format=torch.contiguous_format)
    size = weight.numel()
    weights = weight.reshape(1, -1).expand(_WEIGHTED_ROWS, size).contiguous()
    n_rows, row_bytes = rows.numel() // size, size // 64 * BLOCK_BYTES[bits]

    def part(first: int, last: int) -> None:
        for row in range(first, last, _WEIGHTED_ROWS):
            source = ffi.cast("float *", rows.data_ptr() + row * size * 4)
            to = ffi.cast("void *", target.data_ptr() + row * row_bytes)
            weighted = ffi.cast("float *", weights.data_ptr())
            n = min(_WEIGHTED_ROWS, last - row) * size
            _check(lib.tbq_quantize_kv_centered(_type_of(bits), source, ffi.NULL, weighted, to, n))

    threads = max(1, min(torch.get_num_threads(), rows.numel() // _VALUES_PER_THREAD))
    _run_on_threads(lambda i: part(n_rows * i // threads, n_rows * (i + 1) // threads), threads)
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
    """Backend.decode."""
    return (
        _decode(k_packed, k_bits, k_size, dtype, half) if k_bits and k_packed is not None else None,
        _decode(v_packed, v_bits, v_size, dtype, 0) if v_bits and v_packed is not None else None,
    )


def _decode(packed: torch.Tensor, bits: int, size: int, dtype: torch.dtype, half: int) -> torch.Tensor:
    batch, tokens, heads, _ = packed.shape
    # the library makes these two dtypes, and only float32 of exact rows
    made = torch.float16 if dtype == torch.float16 and bits != EXACT else torch.float32
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
    """Decodes contiguous blocks to contiguous float32 or float16."""
    function, ctype = (
        (lib.tbq_dequantize_f16, "uint16_t *") if values.dtype == torch.float16 else (lib.tbq_dequantize, "float *")
    )

    def part(first: int, last: int) -> None:
        source = ffi.cast("void *", rows.data_ptr() + first * BLOCK_BYTES[bits])
        to = ffi.cast(ctype, values.data_ptr() + first * 64 * values.element_size())
        _check(function(_type_of(bits), source, to, (last - first) * 64))

    _run_in_parts(part, values.numel() // 64)


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
    """Backend.attention, with the kernels of tbq-attention.h."""
    batch, heads, tokens, _ = query.shape
    n_kv = k_packed.shape[1]
    v_size = v_packed.shape[3] // BLOCK_BYTES[v_bits] * 64
    rows = query.to(torch.float32)
    rows = rows.index_select(3, channel_order(rows.shape[3], half)) if half else rows
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    logits = None if sinks is None else sinks.to(torch.float32).contiguous()
    out = torch.empty((batch, tokens, heads, v_size), dtype=torch.float32)
    # The query tokens are divided: one call of the library would need a mask of tokens times n_kv f16 values.
    step = tokens if mask is None and not causal else _MASK_TOKENS
    for first in range(0, tokens, step):
        last = min(first + step, tokens)
        seen = n_kv - tokens + last if causal else n_kv
        part = torch.empty((batch, last - first, heads, v_size), dtype=torch.float32) if last - first < tokens else out
        _run_attention(
            rows[:, :, first:last],
            k_packed[:, :seen],
            k_bits,
            v_packed[:, :seen],
            v_bits,
            scale,
            _f16_mask(mask, first, last, seen, causal, n_kv - tokens),
            softcap,
            logits,
            part,
            None if k_exact is None or v_exact is None else _ExactPart(k_exact, v_exact, n_kv),
            k_mean,
        )
        if part is not out:
            out[:, first:last] = part
    return out.to(query.dtype)


def _f16_mask(
    mask: torch.Tensor | None, first: int, last: int, seen: int, causal: bool, before: int
) -> torch.Tensor | None:
    """Makes the mask of some query tokens: f16 numbers to add, or None.  before: cached tokens before the queries."""
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


class _ExactPart(NamedTuple):
    """Exact keys and values, and the number of rows of the cache that they belong to."""

    k: ExactRows
    v: ExactRows
    n_kv: int


@functools.lru_cache(maxsize=4)  # all layers ask for the same one
def _exact_cells(n_slots: int, first: int, newest: int, n_kv: int, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of the cache for each slot, -1 for none, and a bitmap of these rows.  Only rows below seen count."""
    slot = torch.arange(n_slots, dtype=torch.int32)
    rows = torch.where(slot < first, slot, torch.where(slot < newest, -1, slot + (n_kv - n_slots)))
    rows = rows.masked_fill(rows >= seen, -1)
    is_exact = torch.zeros(-(-seen // 32) * 32, dtype=torch.bool)
    is_exact[rows[rows >= 0].long()] = True
    words = (is_exact.reshape(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)
    return rows[: max(first, n_slots - (n_kv - seen))].to(torch.int32).contiguous(), words


def _run_attention(
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
    exact: _ExactPart | None,
    k_mean: torch.Tensor | None,
) -> None:
    a = ffi.new("tbq_attention *")
    a.n_streams, a.n_head, a.n_tokens, a.k_size = query.shape
    a.n_kv, a.n_head_kv, a.v_size = k.shape[1], k.shape[2], out.shape[3]
    a.q = ffi.cast("float *", query.data_ptr())
    a.q_stream_stride, a.q_head_stride, a.q_token_stride = (4 * stride for stride in query.stride()[:3])
    sides = [(a.k, k, k_bits), (a.v, v, v_bits)]
    if exact is not None:
        cells, hidden = _exact_cells(exact.k.slots.shape[1], *exact.k[1:], exact.n_kv, k.shape[1])
        sides += [(a.exact_k, exact.k.slots, EXACT), (a.exact_v, exact.v.slots, EXACT)]
        a.n_exact, a.exact_stream_stride = cells.shape[0], 0  # the same list for every sequence
        a.cells = ffi.cast("int32_t *", cells.data_ptr())
        a.packed_hidden = ffi.cast("uint32_t *", hidden.data_ptr())
    for tensor, packed, bits in sides:
        tensor.type, tensor.n_streams = _type_of(bits), packed.shape[0]
        tensor.data = ffi.cast("void *", packed.data_ptr())
        tensor.stream_stride, tensor.row_stride, tensor.head_stride = packed.stride()[:3]
    if mask is not None:
        a.mask, a.mask_n_streams, a.mask_n_heads = ffi.cast("uint16_t *", mask.data_ptr()), mask.shape[0], mask.shape[1]
        a.mask_stream_stride, a.mask_head_stride, a.mask_token_stride = (2 * stride for stride in mask.stride()[:3])
        if mask.shape[2] == 1:
            a.mask_token_stride = 0
    if sinks is not None:
        a.sinks = ffi.cast("float *", sinks.data_ptr())
    if k_mean is not None:
        a.mean = ffi.cast("float *", k_mean.data_ptr())
    a.scale, a.logit_softcap, a.out = scale, softcap, ffi.cast("float *", out.data_ptr())
    plan = ffi.new("tbq_attention_plan *")
    _check(lib.tbq_attention_make_plan(a, plan))

    threads = max(
        1, min(torch.get_num_threads(), plan.n_items, query.shape[0] * a.n_kv * a.n_head * a.n_tokens // 1024)
    )
    work = torch.empty(lib.tbq_attention_work_bytes(plan, threads), dtype=torch.uint8)
    memory, kernels = ffi.cast("void *", work.data_ptr()), lib.tbq_best_kernels()
    _run_on_threads(lambda thread: lib.tbq_attention_run_share(plan, kernels, thread, threads, memory), threads)
    if plan.n_chunks > 1:
        lib.tbq_attention_merge(plan, kernels, 0, plan.n_rows, memory)


def _run_in_parts(function: Callable[[int, int], None], n: int) -> None:
    """Calls function(first, last) for parts of n blocks, on at most as many threads as torch uses."""
    threads = max(1, min(torch.get_num_threads(), n * 64 // _VALUES_PER_THREAD))
    _run_on_threads(lambda i: function(n * i // threads, n * (i + 1) // threads), threads)


def _run_on_threads(function: Callable[[int], None], threads: int) -> None:
    """Calls function(i) for each thread i, function(0) in this one.  Raises the first error when all have returned."""
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
    """Returns waiting threads.  They are kept by process, because a forked process has none of its parent's threads."""
    return concurrent.futures.ThreadPoolExecutor(threads - 1, thread_name_prefix="tbq")


def _check(status: Any) -> None:
    if status != lib.TBQ_OK:
        raise TBQError(ffi.string(lib.tbq_status_text(status)).decode())
