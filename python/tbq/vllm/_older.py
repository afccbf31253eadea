# SPDX-License-Identifier: MIT
"""What vLLM before 0.33 has no call for: --kv-cache-dtype of a package, and in 0.25 the bytes of its slots."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tbq.vllm._names import Bits


def register_dtypes(dtypes: Mapping[str, Bits]) -> None:
    """Adds dtypes to the tables of vLLM 0.25 to 0.32."""
    from typing import Literal, get_args

    import pydantic
    import vllm.config.cache as cache
    import vllm.engine.arg_utils as arguments
    import vllm.v1.attention.selector as selector
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    if set(dtypes) <= set(get_args(cache.CacheDType)):
        return
    names = Literal[(*get_args(cache.CacheDType), *dtypes)]  # type: ignore[valid-type]
    for module in (cache, arguments, selector):
        module.CacheDType = names
    cache.CacheConfig.__annotations__["cache_dtype"] = names
    cache.CacheConfig.__dataclass_fields__["cache_dtype"].type = names
    cache.CacheConfig.__pydantic_fields__["cache_dtype"].annotation = names
    pydantic.dataclasses.rebuild_dataclass(cache.CacheConfig, force=True)
    arguments.EngineArgs.__annotations__["kv_cache_dtype"] = names
    for field in dataclasses.fields(arguments.EngineArgs):
        if field.name == "kv_cache_dtype":
            field.type = names
    for dtype in dtypes:
        STR_DTYPE_TO_TORCH_DTYPE[dtype] = torch.uint8
    from vllm.v1.attention.backend import AttentionBackend

    if not hasattr(AttentionBackend, "customize_spec"):
        _pages_of_0_25(dtypes)


def _pages_of_0_25(dtypes: Mapping[str, Bits]) -> None:
    """Gives the layers of vLLM 0.25 pages of our slots.  Its class for pages of packed slots is that of its own
    TurboQuant types; sliding windows have full pages."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.kv_cache_interface import TQFullAttentionSpec

    own = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        if self.kv_cache_dtype not in dtypes:
            return own(self, vllm_config)
        return TQFullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            tq_slot_size=dtypes[self.kv_cache_dtype].slot_bytes(self.head_size),
        )

    Attention.get_kv_cache_spec = get_kv_cache_spec


def register_backend_name(name: str, path: str) -> None:
    """Makes the name known where register_backend() takes only members of the enumeration."""
    import vllm.v1.attention.backends.registry as registry

    enum: Any = registry.AttentionBackendEnum
    if name in enum.__members__:
        return
    member = object.__new__(enum)
    member._name_, member._value_ = name, path
    enum._member_map_[name] = member
    enum._value2member_map_[path] = member
    enum._member_names_.append(name)
