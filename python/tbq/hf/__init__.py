# SPDX-License-Identifier: MIT
"""tbq.hf: HuggingFace models with a cache of 2 to 4 bits per value.  It needs ggml-tbq[hf].

    >>> from tbq.hf import TBQCache
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tbq")
    >>> cache = TBQCache(model, k_bits=4, v_bits=4)
    >>> model.generate(**inputs, past_key_values=cache)
    >>> cache.baseline_nbytes / cache.nbytes
    3.76

Importing this package registers the attention implementation "tbq", which reads the blocks.  With any other ("sdpa",
"eager", ...) the cache decodes one layer at a time.
"""

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
except ImportError as _error:
    from tbq.errors import TBQError

    raise TBQError(
        f"tbq.hf needs transformers 4.57 or newer, and torch: pip install 'ggml-tbq[hf]' ({_error})"
    ) from None

from tbq.hf._attention import attention
from tbq.hf._cache import TBQCache
from tbq.hf._cache_layers import PackedStates, TBQLayer, TBQSlidingLayer
from tbq.hf._center import KeyCenter

__all__ = ["KeyCenter", "PackedStates", "TBQCache", "TBQLayer", "TBQSlidingLayer", "attention"]

AttentionInterface.register("tbq", attention)
# Masks as for torch's attention: True is visible; no mask if attention is only causal, or for a single token.
AttentionMaskInterface.register("tbq", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
