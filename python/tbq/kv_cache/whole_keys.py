# SPDX-License-Identifier: MIT
"""Models whose attention sees more of a key than what is left when a constant is subtracted from all of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tbq.errors import TBQError
from tbq.kv_cache.layers import read_shape

if TYPE_CHECKING:
    from tbq.gguf_files.reader import GGUFModel, Tensor

#: Architectures that cap the logits of attention: gemma2.cpp and grok.cpp.
SOFT_CAPPED = ("gemma2", "grok")


def needs_whole_keys(model: "GGUFModel", fields: Mapping[str, Any] | None = None) -> str | None:
    """Why a model's keys can be centered only in a tbq type, or None: llama_center_needs_mean() of llama-center.cpp.

    With a tbq type, attention has the mean as one more operand, and its result is that of whole keys.
    fields: the metadata with llama.cpp's options applied; the model's own if None.
    """
    fields = model.metadata if fields is None else fields
    try:
        mla = read_shape(fields).mla
    except TBQError:  # llama.cpp will report what is wrong, or runs it
        mla = False
    return whole_keys_reason(str(fields.get("general.architecture")), model.tensors, mla)


def whole_keys_reason(architecture: str, tensors: "Sequence[Tensor]", mla: bool) -> str | None:
    """The reason of needs_whole_keys(), for an architecture, its tensors, and whether it has latent attention."""
    if any(tensor.name.endswith("attn_sinks.weight") for tensor in tensors):
        return "attention sinks"
    if architecture in SOFT_CAPPED:
        return "a soft-cap of the attention logits"
    return "latent attention (MLA)" if mla else None
