# SPDX-License-Identifier: MIT
"""Where vLLM looks for the backend TBQ.

vLLM asks the backend's class for the bytes of a slot, and names no --kv-cache-dtype then.  So there is a class for
each, and Backend is that of the engine that is being made.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Backend":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.config import get_current_vllm_config_or_none

    from tbq.vllm._backend import backend_of

    config = get_current_vllm_config_or_none()
    return backend_of(str(config.cache_config.cache_dtype) if config is not None else "")
