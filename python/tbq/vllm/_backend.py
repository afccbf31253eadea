# SPDX-License-Identifier: MIT
"""The attention backend: its pages, its metadata, and what a layer does with them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from tbq.errors import TBQError
from tbq.vllm import _cpu, _dense
from tbq.vllm._names import DTYPES, HEAD_SIZES, Bits, bits_of
from tbq.vllm._options import LayerCenter, center_of_layer, half_of, load_center, read_options

#: Tokens of a page that is one tile of the kernel: a tile then needs one look into the block table.
_PAGE = 64
#: vLLM 0.25 has no customize_spec(), and pages (pages, tokens, heads, bytes); later ones (pages, heads, tokens, bytes).
_HEADS_FIRST = hasattr(AttentionBackend, "customize_spec")


class Backend(AttentionBackend):
    """--attention-backend TBQ.  The subclasses below have the bits."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    bits: ClassVar[Bits | None] = None

    @staticmethod
    def get_name() -> str:
        return "TBQ"

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type["MetadataBuilder"]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, _PAGE)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in DTYPES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # not tested

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *args: Any, **kwargs: Any
    ) -> str | None:
        if head_size not in HEAD_SIZES:
            return f"head size {head_size}: tbq's blocks need one of {', '.join(map(str, HEAD_SIZES))}"
        if kv_cache_dtype not in DTYPES:
            return f"--attention-backend TBQ needs --kv-cache-dtype {', '.join(DTYPES)}, not {kv_cache_dtype}"
        return None

    # --- pages ------------------------------------------------------------------------------------------------------

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Slots of our bytes."""
        if cls.bits is None or spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=cls.bits.slot_bytes(spec.head_size, spec.head_size_v))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """All heads of a token are next to each other."""
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return (KVCacheLayout.LBNHC,)

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return cls.__module__, cls.__qualname__

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """vLLM 0.25 asks this, of some types with "auto" for their name."""
        bits = cls.bits or bits_of(cache_dtype_str)
        return num_blocks, block_size, num_kv_heads, bits.slot_bytes(head_size)


def backend_of(dtype: str) -> type[Backend]:
    """Returns the subclass for a --kv-cache-dtype: vLLM asks a class, not an object, for the bytes of a slot."""
    found = globals()[f"Backend_{dtype}"] if dtype in DTYPES else Backend
    assert issubclass(found, Backend)
    return found


for _dtype, _bits in DTYPES.items():
    globals()[f"Backend_{_dtype}"] = type(f"Backend_{_dtype}", (Backend,), {"bits": _bits, "__module__": __name__})


# --- metadata -------------------------------------------------------------------------------------------------------


@dataclass
class Metadata:
    """What all layers of a step have in common.  Requests that decode come first.

    starts: int32 (requests + 1), where each request's query tokens begin.  lengths: int32 (requests), its tokens with
    these.  table: int32 (requests, pages).
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    tokens: int
    decodes: int  #: requests that decode
    decode_tokens: int
    most_query: int  #: the most query tokens of these
    chunks: int  #: of attend(), for these
    arrived: torch.Tensor | None
    host_starts: Sequence[int]  #: starts and lengths of the others, on the host; on a CPU those of all
    host_lengths: Sequence[int]


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Makes the metadata of a step.  Decoding steps can be CUDA graphs, with drafts too."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = vllm_config.compilation_config.static_forward_context
        impl = layers[layer_names[0]].impl
        self._group = impl.group
        self._heads, self._blocks = impl.num_kv_heads, impl.head_size // 64
        self._most_tokens = vllm_config.model_config.max_model_len
        self._arrived: torch.Tensor | None = None
        if device.type == "cuda":
            from tbq.vllm import _cuda

            rows = (self.reorder_batch_threshold or 1) * self._group
            most = vllm_config.scheduler_config.max_num_seqs
            self._arrived = _cuda.counters(max(most, 1) * self._heads * -(-rows // 16), device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise TBQError("--attention-backend TBQ takes causal attention only")
        decodes, prompts, decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold or 1
        )
        on_gpu = self.device.type == "cuda"
        chunks, most_query = 1, 1
        if decodes:
            most_query = (
                common.max_query_len if not prompts else min(common.max_query_len, self.reorder_batch_threshold or 1)
            )
        if decodes and on_gpu:
            from tbq.vllm import _cuda

            chunks = _cuda.chunks_for(
                decodes, self._heads, most_query * self._group, self._blocks, self._most_tokens, self.device
            )
        host_lengths: Sequence[int] = ()
        host_starts: Sequence[int] = ()
        if prompts or not on_gpu:
            lengths = common.seq_lens if not on_gpu else common.seq_lens_cpu_upper_bound
            if lengths is None:
                lengths = common.seq_lens
            host_lengths, host_starts = lengths.tolist(), common.query_start_loc_cpu.tolist()
        return Metadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.num_actual_tokens,
            decodes,
            decode_tokens,
            most_query,
            chunks,
            self._arrived,
            host_starts,
            host_lengths,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Metadata:
        """The grid depends on no length, so the captured step may be the shortest one."""
        metadata = self.build(0, common_attn_metadata)
        metadata.lengths.fill_(1)
        return metadata


# --- a layer --------------------------------------------------------------------------------------------------------


class Impl(AttentionImpl[Metadata]):
    """A layer's attention."""

    supports_quant_query_input: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        config = get_current_vllm_config()
        refuse = {
            "ALiBi": alibi_slopes is not None or others.pop("use_alibi_sqrt", False),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            f"head size {head_size}": head_size not in HEAD_SIZES,
            "decode context parallelism": config.parallel_config.decode_context_parallel_size > 1,
            "microbatches (--enable-dbo)": getattr(config.parallel_config, "enable_dbo", False),
            ", ".join(others): any(value not in (None, False, -1) for value in others.values()),
        }
        if refused := [name for name, given in refuse.items() if given]:
            raise TBQError(f"--attention-backend TBQ does not take {' and '.join(refused)}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.group = num_heads // self.num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.bits = bits_of(kv_cache_dtype)
        self.sinks = sinks
        self.window = sliding_window or 0
        self.softcap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        options = read_options(config.additional_config)
        self._half = half_of(options.pairs, config.model_config.hf_text_config, head_size)
        self._center_file = options.center
        self._center: LayerCenter | None = None
        self._center_known = options.center is None
        self._ranks = config.parallel_config.tensor_parallel_size

    def _pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        return kv_cache.transpose(1, 2) if _HEADS_FIRST else kv_cache

    def _center_of(self, layer: Any, device: torch.device) -> LayerCenter | None:
        if not self._center_known:
            from vllm.distributed import get_tensor_model_parallel_rank

            assert self._center_file is not None
            self._center = center_of_layer(
                load_center(self._center_file),
                extract_layer_index(self.kv_sharing_target_layer_name or layer.layer_name),
                self.num_kv_heads,
                self.head_size,
                get_tensor_model_parallel_rank(),
                self._ranks,
                self._half,
                device,
            )
            self._center_known = True
        return self._center

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Encodes new keys and values, (tokens, KV heads, size), to their slots."""
        center = self._center_of(layer, key.device)
        module: Any = _cpu
        if key.device.type != "cpu":
            from tbq.vllm import _cuda as module
        module.store(
            key,
            value,
            self._pages(kv_cache),
            slot_mapping,
            *self.bits,
            self._half,
            None if center is None else center.mean,
            None if center is None else center.weight,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of new tokens, whose keys and values are in their slots already.

        query, output: (tokens, query heads, size).
        """
        if output_scale is not None or output_block_scale is not None:
            raise TBQError("--attention-backend TBQ does not take quantized outputs")
        assert output is not None
        if attn_metadata is None:  # vLLM measures its memory
            return output.zero_()
        data = attn_metadata
        center = self._center_of(layer, query.device)
        out = output.view(output.shape[0], self.num_heads, self.head_size)
        query = query.view(query.shape[0], self.num_heads, self.head_size)
        pages = self._pages(kv_cache)
        if query.device.type == "cpu":
            self._attend_on_cpu(query, key, value, pages, data, center, out)
            return output
        from tbq.vllm import _cuda

        if data.decodes:
            assert data.arrived is not None
            _cuda.attend(
                query,
                data.starts[: data.decodes + 1],
                data.lengths[: data.decodes],
                pages,
                data.table[: data.decodes],
                out,
                *self.bits,
                self.scale,
                data.most_query,
                data.chunks,
                data.arrived,
                softcap=self.softcap,
                window=self.window,
                sinks=self.sinks,
                half=self._half,
                mean=None if center is None else center.mean,
            )
        for i in range(data.decodes, len(data.host_lengths)):
            self._attend_to_chunk(query, key, value, pages, data, i, center, out, _cuda)
        return output

    def _attend_on_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        data: Metadata,
        center: LayerCenter | None,
        out: torch.Tensor,
    ) -> None:
        for i, length in enumerate(data.host_lengths):
            first, last = data.host_starts[i : i + 2]
            if i >= data.decodes:
                self._attend_to_chunk(query, key, value, pages, data, i, center, out, _cpu)
            elif last > first:
                out[first:last] = _cpu.attend(
                    query[first:last],
                    pages,
                    data.table[i],
                    length,
                    *self.bits,
                    self.head_size,
                    self.scale,
                    softcap=self.softcap,
                    window=self.window,
                    sinks=self.sinks,
                    half=self._half,
                    mean=None if center is None else center.mean,
                )

    def _attend_to_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        data: Metadata,
        i: int,
        center: LayerCenter | None,
        out: torch.Tensor,
        kernels: Any,
    ) -> None:
        """A prompt's chunk: attends to itself exactly, and to what its pages decode to before it."""
        first, last = data.host_starts[i : i + 2]
        length = data.host_lengths[i]
        if last <= first:
            return
        shares = self.kv_sharing_target_layer_name is not None  # then key and value are not those of the pages
        stored = length if shares else length - (last - first)
        # what no token of the chunk sees
        begin = max(0, length - (last - first) + 1 - self.window) if self.window else 0
        begin = min(begin, stored)
        if stored - begin:
            sides = [
                torch.empty((length - begin, self.num_kv_heads, self.head_size), dtype=query.dtype, device=query.device)
                for _ in range(2)
            ]
            kernels.unpack(
                pages,
                data.table[i],
                begin,
                *(side[: stored - begin] for side in sides),
                *self.bits,
                self._half,
                None if center is None else center.whole,
            )
            if not shares:
                for side, new in zip(sides, (key, value)):
                    side[stored - begin :] = new[first:last].view(-1, self.num_kv_heads, self.head_size)
        else:
            sides = [new[first:last].view(-1, self.num_kv_heads, self.head_size) for new in (key, value)]
        out[first:last] = _dense.attend(
            query[first:last], sides[0], sides[1], self.scale, self.softcap, self.window, self.sinks
        )
