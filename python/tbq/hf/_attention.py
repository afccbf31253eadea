# SPDX-License-Identifier: MIT
"""attn_implementation="tbq": attention that reads the packed cache."""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tbq.errors import TBQError
from tbq.hf import _backend
from tbq.hf._cache_layers import PackedStates
from tbq.hf._center import see_query_of

#: Query rows of a KV head (query tokens times query heads) up to which CUDA attends to blocks.  A prompt has more; then
#: it is faster to decode the layer once and to use torch's attention.
_DECODE_ROWS = 64


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface calls it.

    query: (batch, heads, tokens, size).  key, value: states of a TBQCache, or any others.
    softcap, s_aux (attention sinks, one for each head): as in transformers' flash attention.
    Returns (batch, tokens, heads, value size), and no weights.
    """
    if kwargs.get("position_bias") is not None:
        raise TBQError("attn_implementation='tbq' takes no position_bias; 'sdpa' does")
    if dropout:
        raise TBQError(f"dropout is {dropout}; attn_implementation='tbq' takes none: call model.eval()")
    if see_query := see_query_of(key):
        see_query(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if (
        isinstance(key, PackedStates)
        and isinstance(value, PackedStates)
        and _kernels_take(query, key, value, softcap, s_aux)
    ):
        sees_constant = bool(softcap) or s_aux is not None  # one that is added to all logits
        query = query if query.stride(3) == 1 else query.contiguous()
        return _backend.backend_for(query.device).attention(
            query,
            key.packed,
            key.bits,
            value.packed,
            value.bits,
            scale,
            attention_mask,
            causal,
            softcap or 0.0,
            s_aux,
            key.rotary_half,
            key.exact,
            value.exact,
            key.stored_mean if sees_constant else None,
        ), None
    key, value = (states.decoded() if isinstance(states, PackedStates) else states for states in (key, value))
    if softcap or s_aux is not None:
        return _plain_attention(query, key, value, attention_mask, scale, causal, softcap, s_aux), None
    out: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scale, is_causal=causal
    )
    return out


def _kernels_take(
    query: torch.Tensor, key: PackedStates, value: PackedStates, softcap: float | None, s_aux: torch.Tensor | None
) -> bool:
    """Whether the kernels of this device are used.

    CUDA's do not take every head size, and take prompts only if torch's attention cannot.
    """
    if query.device.type == "cpu":
        return True
    most = _backend.backend_for(query.device).MOST_BLOCKS * 64
    decode_size = query.shape[1] // key.shape[1] * query.shape[2] <= _DECODE_ROWS
    return key.shape[3] <= most and value.shape[3] <= most and (decode_size or bool(softcap) or s_aux is not None)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with soft-caps and sinks over states that are not packed; torch's attention has neither."""
    batch, heads, tokens, _ = query.shape
    group, n_kv = heads // key.shape[1], key.shape[2]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        mask = torch.ones(tokens, n_kv, dtype=torch.bool, device=query.device).tril_(n_kv - tokens)[None, None]
    if mask is not None:
        mask = mask[..., :n_kv]
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(batch, heads, tokens, 1)], dim=3)
    weights = logits.softmax(3, dtype=torch.float32)[..., :n_kv].to(value.dtype)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous()
