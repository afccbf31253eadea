# SPDX-License-Identifier: MIT
"""tbq.vllm: vLLM with pages of 2 to 4 bits per value.  It needs ggml-tbq[vllm].

    vllm serve MODEL --kv-cache-dtype tbq4 --attention-backend TBQ

vLLM finds register() and platform() by their entry points; nothing has to be imported.
"""

from typing import Any

from tbq.vllm._names import DTYPES

__all__ = ["DTYPES", "platform", "register"]

_BACKEND = "TBQ"


class BackendPath(str):
    """Where the backend is.  A process that vLLM starts unpickles its settings, the backend among them, before it asks
    packages for their backends: unpickling this asks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (str(self),)


def _registered(path: str) -> BackendPath:
    register()
    return BackendPath(path)


def register() -> None:
    """Entry point of vllm.general_plugins: makes cache types and the backend known.  May be called again."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from tbq.vllm import _older

    try:
        from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
        from vllm.v1.kv_cache_interface import KVQuantMode
    except ImportError:
        _older.register_dtypes(DTYPES)
    else:
        for dtype in DTYPES:
            if get_kv_cache_dtype_handler(dtype) is not None:
                continue

            class Handler:
                name = dtype

                def torch_dtype(self) -> torch.dtype:
                    return torch.uint8

                def quant_mode(self) -> KVQuantMode:
                    return KVQuantMode.CUSTOM

            register_kv_cache_dtype(dtype)(Handler)
    path = BackendPath("tbq.vllm._choice.Backend")
    if not hasattr(AttentionBackendEnum, "register"):
        _older.register_backend_name(_BACKEND, path)
    known = _BACKEND in AttentionBackendEnum.__members__
    register_backend(AttentionBackendEnum[_BACKEND] if known else _BACKEND, path)


def platform() -> str | None:
    """Entry point of vllm.platform_plugins: where vLLM runs on a CPU, it takes no backend but its own unless the
    platform says so.  Returns the name of a platform, None on others."""
    from vllm.platforms import builtin_platform_plugins

    if any(name != "cpu" and plugin() is not None for name, plugin in builtin_platform_plugins.items()):
        return None
    own = builtin_platform_plugins["cpu"]()
    return "tbq.vllm._platform.Platform" if own == "vllm.platforms.cpu.CpuPlatform" else None
