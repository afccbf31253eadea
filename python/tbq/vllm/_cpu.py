# SPDX-License-Identifier: MIT
"""Pages on a CPU: libtbq's kernels on the rows that are copied out of the pages.

Shapes are those of _cuda.py.
"""

import torch

from tbq.hf import _cpu as kernels


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
    """Encodes keys and values to their slots, as _cuda.store()."""
    tokens, heads, slot = slots.shape[0], pages.shape[2], pages.shape[3]
    k_bytes = k.shape[2] // 64 * (2 + 8 * k_bits)
    rows = torch.empty((1, tokens, heads, slot), dtype=torch.uint8)
    sides = (x[:tokens].transpose(0, 1)[None] for x in (k, v))
    k, v = (x.float() if x.dtype == torch.bfloat16 else x for x in sides)
    kernels.encode(k, rows[..., :k_bytes], k_bits, v, rows[..., k_bytes:], v_bits, half, mean, weight)
    kept = slots >= 0
    pages.view(-1, heads, slot)[slots[kept].long()] = rows[0][kept]


def gather(pages: torch.Tensor, table: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Returns the slots of a sequence's tokens first ... last - 1, (tokens, heads, bytes).  table: its pages."""
    page = pages.shape[1]
    begin = first // page
    numbers = table[begin : -(-last // page)].long()
    if numbers.numel() and bool((numbers.diff() == 1).all()):  # one piece of memory
        rows = pages[int(numbers[0]) : int(numbers[-1]) + 1]
    else:
        rows = pages[numbers]
    return rows.reshape(-1, *pages.shape[2:])[first - begin * page : last - begin * page]


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
    """Decodes tokens of one sequence to k and v, as _cuda.unpack()."""
    if not k.shape[0]:
        return
    rows = gather(pages, table, first, first + k.shape[0])[None]
    k_bytes = k.shape[2] // 64 * (2 + 8 * k_bits)
    sides = rows[..., :k_bytes].contiguous(), k_bits, k.shape[2], rows[..., k_bytes:].contiguous(), v_bits, v.shape[2]
    whole_k, whole_v = kernels.decode(*sides, torch.float32, half)
    assert whole_k is not None and whole_v is not None
    keys = whole_k[0].transpose(0, 1)
    k.copy_(keys if mean is None else keys + mean)
    v.copy_(whole_v[0].transpose(0, 1))


def attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    length: int,
    k_bits: int,
    v_bits: int,
    v_size: int,
    scale: float,
    *,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    half: int = 0,
    mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest tokens of one sequence to its pages.  q: (tokens, query heads, head size)."""
    tokens = q.shape[0]
    before = length - tokens
    begin = max(0, before + 1 - window) if window else 0
    rows = gather(pages, table, begin, length)[None]
    k_bytes = q.shape[2] // 64 * (2 + 8 * k_bits)
    mask = None
    if window and tokens > 1:
        at, n = torch.arange(before, length)[:, None], torch.arange(begin, length)[None]
        mask = ((n <= at) & (n > at - window))[None, None]
    out = kernels.attention(
        q.transpose(0, 1)[None],
        rows[..., :k_bytes],
        k_bits,
        rows[..., k_bytes:],
        v_bits,
        scale,
        mask,
        mask is None and tokens > 1,
        softcap,
        sinks,
        half,
        k_mean=mean if softcap or sinks is not None else None,
    )
    return out[0]
