# SPDX-License-Identifier: MIT
"""Attention of a prompt's chunk to keys and values that are not packed."""

import torch

#: Query tokens at a time where a mask is made: it bounds the memory.
_STEP = 512


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest tokens of one sequence.

    q: (tokens, query heads, size).  k, v: (all tokens, KV heads, size).  window: how many of the newest tokens a token
    sees, itself included; 0: all.  Returns (tokens, query heads, value size).
    """
    tokens, length = q.shape[0], k.shape[0]
    plain = not softcap and sinks is None
    if plain and not window and tokens == length:
        return _torch_attention(q, k, v, scale, None, causal=True)
    before = length - tokens
    out = torch.empty((tokens, q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    for first in range(0, tokens, _STEP):
        last = min(first + _STEP, tokens)
        begin = max(0, before + first + 1 - window) if window else 0
        at = torch.arange(before + first, before + last, device=q.device)[:, None]
        n = torch.arange(begin, before + last, device=q.device)[None]
        mask = n <= at
        if window:
            mask &= n > at - window
        part = q[first:last], k[begin : before + last], v[begin : before + last]
        out[first:last] = (
            _torch_attention(*part, scale, mask) if plain else _plain_attention(*part, scale, mask, softcap, sinks)
        )
    return out


def _torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool = False,
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """With soft-caps and sinks, which torch's attention has not."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    rows = q.reshape(q.shape[0], heads, group, q.shape[2]).permute(1, 2, 0, 3)  # (KV heads, group, tokens, size)
    logits = (rows @ k.permute(1, 2, 0)[:, None]).float() * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().reshape(heads, group, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=3)
    weights = logits.softmax(3)[..., : k.shape[0]].to(v.dtype)
    return (weights @ v.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
