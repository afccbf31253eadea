# SPDX-License-Identifier: MIT
"""Cache layers whose keys and values are tbq blocks."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tbq.errors import TBQError
from tbq.hf import _backend, _tables

#: Tokens of room that a full layer takes at a time, or 1/64 of its length: 1.6 % of memory at most is not in use.
_ROOM = 64


class Side:
    """The keys, or the values, of a layer: rows of tokens in one tensor that grows.

    bits: 2, 3 or 4, or 0 for rows in the model's dtype.  data: (batch, room, heads, bytes or size).
    half: of the first 2 half channels, c and c + half are neighbors in the blocks.
    """

    def __init__(self, bits: int, states: torch.Tensor, half: int = 0) -> None:
        batch, heads, _, size = states.shape
        if bits and (size % 64 or size == 0):
            raise TBQError(f"head size {size} is not a multiple of 64: pass k_bits=None and v_bits=None for this model")
        self.bits, self.size, self.dtype = bits, size, states.dtype
        self.half = half if bits and 2 * half <= size else 0
        self.row = size // 64 * _tables.BLOCK_BYTES[bits] if bits else size
        self.data = torch.empty(
            (batch, 0, heads, self.row), dtype=torch.uint8 if bits else states.dtype, device=states.device
        )

    def make_room(self, start: int, stop: int, room: int) -> None:
        """Moves rows start ... stop to the front of a tensor with `room` rows."""
        data = self.data.new_empty((self.data.shape[0], room, *self.data.shape[2:]))
        data[:, : stop - start] = self.data[:, start:stop]
        self.data = data


class PackedStates(torch.Tensor):
    """Keys or values that are still packed: shape, dtype and device of what they stand for.

    attn_implementation="tbq" reads the blocks.  Any other operation decodes them first, so that whatever a model does with
    them between cache and attention is right.
    """

    packed: torch.Tensor  #: uint8 (batch, tokens, heads, bytes)
    bits: int
    rotary_half: int  #: half: of the first 2 half channels, c and c + half are neighbors

    @staticmethod
    def __new__(cls, packed: torch.Tensor, bits: int, size: int, dtype: torch.dtype, half: int) -> "PackedStates":
        batch, tokens, heads, _ = packed.shape
        self: PackedStates = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, tokens, size), dtype=dtype, device=packed.device
        )
        self.packed, self.bits, self.rotary_half = packed, bits, half
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(cls, cls.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedStates(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', bits={self.bits})"

    def decoded(self) -> torch.Tensor:
        """An ordinary tensor."""
        backend = _backend.backend_for(self.device)
        states, _ = backend.decode(self.packed, self.bits, self.shape[-1], None, 0, 64, self.dtype, self.rotary_half)
        assert states is not None
        return states


class TBQLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of full attention.  k_bits, v_bits: 2, 3, 4, or None for the model's own dtype.

    config: of the model, whose attention implementation decides at each update whether attention takes blocks ("tbq") or
    values; None: values.  half: the rotary embedding turns channels c and c + half of a key (the first 2 half) into each other;
    they are stored as neighbors, which is what the encoder's noise shaping expects (docs/hf.md).  0: as they are.
    """

    def __init__(self, k_bits: int | None = 4, v_bits: int | None = 4, config: Any = None, half: int = 0) -> None:
        self.bits, self.half = (k_bits or 0, v_bits or 0), half
        self.config = config
        super().__init__()
        self._drop()

    def _drop(self) -> None:
        self.sides: tuple[Side, Side] | None = None
        self.start = self.stop = 0  #: rows in use
        self.is_initialized = False

    # what the base class keeps as tensors

    @property
    def keys(self) -> torch.Tensor | None:
        """(batch, heads, tokens, size), decoded on each access; None before the first update."""
        return self._decoded(self.start)[0] if self.sides else None

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse(value)

    @property
    def values(self) -> torch.Tensor | None:
        """As keys."""
        return self._decoded(self.start)[1] if self.sides else None

    @values.setter
    def values(self, value: None) -> None:
        _refuse(value)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rows of keys and of values, (batch, tokens, heads, bytes): views, uint8 where packed."""
        return (self._rows(0, self.start), self._rows(1, self.start)) if self.sides else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """transformers 4 passes the keys only."""
        value_states = key_states if value_states is None else value_states
        _check_states(key_states, value_states)
        self.sides = Side(self.bits[0], key_states, self.half), Side(self.bits[1], value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._expect()
        self.is_initialized = True

    def _expect(self) -> None:
        """What the next states must be."""
        assert self.sides
        k, v = self.sides
        self.expected = (
            k.data.shape[0],
            k.data.shape[2],
            k.size,
            v.data.shape[0],
            v.data.shape[2],
            v.size,
            k.dtype,
            v.dtype,
            self.device,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packs the new states, (batch, heads, tokens, size); returns those of all cached tokens, decoded or PackedStates.

        Gradients end here.  Raises TBQError for states that do not fit those before them.
        """
        self._append(key_states, value_states)
        return self._states(self.start)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.sides is None or self.start == self.stop and self._does_not_fit(k, v):
            self.lazy_initialization(k, v)
        elif self._does_not_fit(k, v):
            raise TBQError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} in {k.dtype} on {k.device} do not fit a cache of {self._describe()}"
            )
        assert self.sides
        if torch.is_grad_enabled():
            k, v = k.detach(), v.detach()
        stop = self.stop + k.shape[2]
        if stop > self.sides[0].data.shape[1]:
            held, needed = self.stop - self.start, stop - self.start
            for side in self.sides:
                side.make_room(self.start, self.stop, needed + max(_ROOM, needed // 64) if held else needed)
            self.start, self.stop, stop = 0, held, needed
        rows = [side.data[:, self.stop : stop] for side in self.sides]
        (k_bits, v_bits), backend = self.bits, _backend.backend_for(k.device)
        if not k_bits:
            rows[0].copy_(k.transpose(1, 2))
        if not v_bits:
            rows[1].copy_(v.transpose(1, 2))
        if (k_bits or v_bits) and k.numel():
            backend.encode(
                _last_axis_contiguous(k),
                rows[0] if k_bits else None,
                k_bits,
                _last_axis_contiguous(v),
                rows[1] if v_bits else None,
                v_bits,
                self.sides[0].half,
            )
        self.stop = stop

    def _rows(self, which: int, start: int) -> torch.Tensor:
        assert self.sides
        return self.sides[which].data[:, start : self.stop]

    def _states(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.sides
        if self.config is not None and self.config._attn_implementation == "tbq" and all(self.bits):
            k, v = self.sides
            return (
                PackedStates(self._rows(0, start), k.bits, k.size, k.dtype, k.half),
                PackedStates(self._rows(1, start), v.bits, v.size, v.dtype, 0),
            )
        return self._decoded(start)

    def _decoded(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.sides
        (k, v), rows = self.sides, (self._rows(0, start), self._rows(1, start))
        plain: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if any(self.bits):
            backend = _backend.backend_for(self.device)
            plain = backend.decode(
                rows[0] if k.bits else None,
                k.bits,
                k.size,
                rows[1] if v.bits else None,
                v.bits,
                v.size,
                self.dtype,
                k.half,
            )
        keys, values = (rows[i].transpose(1, 2) if states is None else states for i, states in enumerate(plain))
        return keys, values

    def _does_not_fit(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        assert self.sides
        if k.ndim != 4 or v.ndim != 4:
            return True
        (k_batch, k_heads, k_tokens, k_size), (v_batch, v_heads, v_tokens, v_size) = k.shape, v.shape
        return (
            k_batch,
            k_heads,
            k_size,
            v_batch,
            v_heads,
            v_size,
            k.dtype,
            v.dtype,
            k.device,
        ) != self.expected or k_tokens != v_tokens

    def _describe(self) -> str:
        assert self.sides
        batch, _, heads, _ = self.sides[0].data.shape
        return f"batch {batch}, {heads} heads, sizes {self.sides[0].size} and {self.sides[1].size} in {self.dtype} on {self.device}"

    # what changes the rows

    def get_seq_length(self) -> int:
        return self.stop - self.start

    def reset(self) -> None:
        self._drop()

    def crop(self, length: int) -> None:
        """length < 0: removes as many tokens; > 0: keeps as many; 0: as this version of transformers has it."""
        if length < 0 or _CROPS_BY and length == 0:
            self.stop = max(self.start, self.stop + length)
        else:
            self.stop = min(self.stop, self.start + length)

    def _select(self, index: torch.Tensor) -> None:
        for side in self.sides or ():
            side.data = side.data.index_select(0, index.to(side.data.device))
        if self.sides:
            self._expect()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sides:
            self._select(torch.arange(self.sides[0].data.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.sides:
            self._select(torch.arange(self.sides[0].data.shape[0], device=indices.device)[indices])

    def offload(self) -> None:
        for side in self.sides or ():
            side.data = side.data.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        for side in self.sides or ():
            side.data = side.data.to(self.device, non_blocking=True)

    # sizes

    def nbytes(self) -> int:
        """Bytes of the tensors, room to grow included."""
        return sum(side.data.numel() * side.data.element_size() for side in self.sides or ())

    def baseline_nbytes(self) -> int:
        """Bytes of the same tokens in the model's dtype."""
        return sum(
            side.data.shape[0] * side.data.shape[2] * side.size * side.dtype.itemsize for side in self.sides or ()
        ) * (self.stop - self.start)


class TBQSlidingLayer(TBQLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer of sliding-window attention: the rows of the last sliding_window - 1 tokens, packed."""

    def __init__(
        self, sliding_window: int, k_bits: int | None = 4, v_bits: int | None = 4, config: Any = None, half: int = 0
    ) -> None:
        self.bits, self.half, self.config = (k_bits or 0, v_bits or 0), half, config
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.record_past = False
        self._drop()

    def _drop(self) -> None:
        super()._drop()
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = min(self.stop - self.start, self.sliding_window - 1)
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        states = self._states(self.stop - visible - key_states.shape[2])
        if not self.record_past:
            self._forget()
        return states

    def _forget(self) -> None:
        """Leaves the window; the rows before it are overwritten when the room is used up."""
        self.start = max(self.start, self.stop - self.sliding_window + 1)
        assert self.sides
        if self.sides[0].data.shape[1] > 2 * (self.sliding_window + _ROOM):  # a long prompt's
            for side in self.sides:
                side.make_room(self.start, self.stop, self.stop - self.start + _ROOM)
            self.start, self.stop = 0, self.stop - self.start

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, length: int) -> None:
        removed = -length if length < 0 or _CROPS_BY and length == 0 else max(0, self.cumulative_length - length)
        held, left = self.stop - self.start, max(0, self.cumulative_length - removed)
        if held - removed < min(left, self.sliding_window - 1):
            raise TBQError(
                f"{removed} tokens cannot be removed: the window of {self.sliding_window} has dropped those before them; "
                "activate_past_recording() before they are added keeps them"
            )
        self.stop -= min(removed, held)
        self.cumulative_length = left
        if self.record_past and self.sides:
            self._forget()


def _refuse(value: object) -> None:
    if value is not None:
        raise TBQError("the states of a TBQLayer are set by update() only")


def _check_states(k: torch.Tensor, v: torch.Tensor) -> None:
    for name, states in (("keys", k), ("values", v)):
        if states.ndim != 4 or states.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TBQError(
                f"{name} are {states.dtype} of shape {tuple(states.shape)}; they must be float32, float16 or bfloat16 of shape "
                "(batch, heads, tokens, size)"
            )
    _backend.backend_for(k.device)


def _last_axis_contiguous(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(3) == 1 else states.contiguous()


#: transformers 5 crops by a number of tokens, 4 to one.
_CROPS_BY = "max_length" not in DynamicLayer.crop.__code__.co_varnames
