# SPDX-License-Identifier: MIT
"""vLLM's CPU platform, which takes TBQ as a backend as well."""

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from tbq.vllm._names import DTYPES


class Platform(CpuPlatform):
    """Differs from vLLM's own in the choice of the backend alone."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        dtype = attn_selector_config.kv_cache_dtype
        named = selected_backend is not None and selected_backend.name == "TBQ"
        if dtype not in DTYPES and not named:
            return str(super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads))
        if not named and selected_backend is not None:
            raise ValueError(f"--kv-cache-dtype {dtype} needs --attention-backend TBQ, not {selected_backend.name}")
        from tbq.vllm._backend import backend_of

        backend = backend_of(str(dtype))
        if reasons := backend.validate_configuration(device_capability=None, **attn_selector_config._asdict()):
            raise ValueError(f"--attention-backend TBQ does not take this: {', '.join(reasons)}")
        return ".".join(backend.full_cls_name())
