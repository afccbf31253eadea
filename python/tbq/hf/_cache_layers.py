# SPDX-License-Identifier: MIT
"""Cache layers that keep keys and values as tbq blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tbq.errors import TBQError
from tbq.hf import _backend
from tbq.hf._buffers import EXACT, ROOM, ExactRows, ExactSlots, StateBuffer, channel_order
from tbq.hf._center import weights_of


class PackedStates(torch.Tensor):
    """Keys or values that are still packed, with the shape, dtype and device of the decoded ones.

    attn_implementation="tbq" reads the blocks.  Any other operation decodes them first, so a model may compute with
    them between cache and attention.
    """

    packed: torch.Tensor  #: uint8 (batch, tokens, heads, bytes)
    bits: int
    rotary_half: int  #: half: channels c and c + half, of the first 2 half channels, are stored next to each other
    exact: ExactRows | None  #: the rows that are read instead of packed ones
    key_mean: torch.Tensor | None  #: float32 (heads, size): what was subtracted from the keys
    stored_mean: torch.Tensor | None  #: the same, in the order in which channels are stored

    @staticmethod
    def __new__(
        cls,
        packed: torch.Tensor,
        bits: int,
        size: int,
        dtype: torch.dtype,
        half: int,
        exact: ExactRows | None = None,
        key_mean: torch.Tensor | None = None,
        stored_mean: torch.Tensor | None = None,
    ) -> "PackedStates":
        batch, tokens, heads, _ = packed.shape
        self: PackedStates = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, tokens, size), dtype=dtype, device=packed.device
        )
        self.packed, self.bits, self.rotary_half, self.exact = packed, bits, half, exact
        self.key_mean, self.stored_mean = key_mean, stored_mean
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
        """Returns the decoded states, an ordinary tensor."""
        backend = _backend.backend_for(self.device)
        size = self.shape[-1]

        def decode(rows: torch.Tensor, bits: int) -> torch.Tensor:
            states, _ = backend.decode(rows, bits, size, None, 0, 64, self.dtype, self.rotary_half)
            assert states is not None
            return states

        states = decode_rows(decode, self.packed, self.bits, self.exact)
        # its rounding to their dtype is one more constant, which softmax does not see
        return states if self.key_mean is None else states.add_(self.key_mean[:, None].to(self.dtype))


def decode_rows(
    decode: Callable[[torch.Tensor, int], torch.Tensor], packed: torch.Tensor, bits: int, exact: ExactRows | None
) -> torch.Tensor:
    """Decodes packed rows, and the exact rows in their places.  decode: rows and their bits to states."""
    if exact is None:
        return decode(packed, bits)
    n_kv, (slots, first, newest) = packed.shape[1], exact
    if first + exact.n_newest == n_kv:
        parts = [decode(slots[:, :first], EXACT)] if first else []
        return torch.cat([*parts, decode(slots[:, newest:], EXACT)], dim=2) if exact.n_newest else parts[0]
    states = decode(packed, bits)
    if first:
        states[:, :, :first] = decode(slots[:, :first], EXACT)
    if exact.n_newest:
        states[:, :, n_kv - exact.n_newest :] = decode(slots[:, newest:], EXACT)
    return states


class _Center:
    """What is subtracted from the keys of a layer, on the device of its states.

    mean: in the model's order of channels.  stored, weight: in the order in which they are stored; weight: what error
    costs in each channel.
    """

    def __init__(self, mean: torch.Tensor | None, energy: torch.Tensor | None) -> None:
        self.mean, self.energy = mean, energy
        self.stored: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None

    def prepare(self, keys: StateBuffer, device: torch.device) -> None:
        """Makes the tensors for keys of this kind."""
        if self.mean is None:
            return
        shape = (keys.data.shape[2], keys.size)
        if not keys.bits:
            self.mean = None
        elif self.mean.shape != shape or self.energy is not None and self.energy.shape != shape:
            raise TBQError(f"the center is for keys of {tuple(self.mean.shape)} heads and channels; these have {shape}")
        else:
            order = channel_order(keys.size, keys.half)
            self.mean = self.mean.to(device)
            self.stored = self.mean[:, order.to(device)].contiguous()
            if self.energy is not None:
                self.weight = weights_of(self.energy[:, order.to(self.energy.device)]).to(device)


class TBQLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of full attention.

    k_bits, v_bits: 2, 3, 4, or None for the model's own dtype.
    config: the model's config.  At each update, its attention implementation decides whether the states are returned
    packed ("tbq") or decoded.  None: decoded.
    half: the rotary embedding turns the channels c and c + half, of the first 2 half channels of a key, into each other
    (NEOX pairs).  They are stored next to each other, as the encoder's noise shaping expects (docs/guide/hf.md).
    0: channels are stored in the model's order.
    recent, first: how many of the newest rows and of the first rows are exact: kept in 8 bits as well, and read instead
    of the packed ones.  Rows are counted as they are cached, padding included.
    mean, energy: float32 (KV heads, head size): the mean of the keys, which is subtracted from them, and the mean
    square of the queries, from which the encoder takes where error costs most.  None: keys are not centered.
    """

    def __init__(
        self,
        k_bits: int | None = 4,
        v_bits: int | None = 4,
        config: Any = None,
        half: int = 0,
        recent: int = 0,
        first: int = 0,
        mean: torch.Tensor | None = None,
        energy: torch.Tensor | None = None,
    ) -> None:
        self.bits, self.half = (k_bits or 0, v_bits or 0), half
        self.config = config
        self.recent, self.first = recent, first
        self.center = _Center(mean, energy)
        super().__init__()
        self._drop_states()

    def _drop_states(self) -> None:
        self.buffers: tuple[StateBuffer, StateBuffer] | None = None
        self.exact: ExactSlots | None = None
        self.start = self.stop = 0  #: rows in use
        self.is_initialized = False

    # the attributes that are tensors in the base class

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys, (batch, heads, tokens, size), decoded on each access; None before the first update."""
        return self._decoded(self.start)[0] if self.buffers else None

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse_assignment(value)

    @property
    def values(self) -> torch.Tensor | None:
        """The values, as keys."""
        return self._decoded(self.start)[1] if self.buffers else None

    @values.setter
    def values(self, value: None) -> None:
        _refuse_assignment(value)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views of the rows of keys and of values, (batch, tokens, heads, bytes): uint8 if they are packed."""
        return (self._rows(0, self.start), self._rows(1, self.start)) if self.buffers else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """As in DynamicLayer.  transformers 4 passes the keys only."""
        value_states = key_states if value_states is None else value_states
        _check_states(key_states, value_states)
        self.buffers = StateBuffer(self.bits[0], key_states, self.half), StateBuffer(self.bits[1], value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        if any(self.bits) and (self.recent or self.first):
            self.exact = ExactSlots(
                self.recent,
                self.first,
                [(buffer.data.shape[0], buffer.data.shape[2], buffer.size) for buffer in self.buffers if buffer.bits],
                self.device,
            )
        self.center.prepare(self.buffers[0], self.device)
        self._remember_shapes()
        self.is_initialized = True

    def _remember_shapes(self) -> None:
        """Remembers the shapes, dtypes and device that later states must have."""
        assert self.buffers
        k, v = self.buffers
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
        """Packs new states, (batch, heads, tokens, size).  Returns the states of all cached tokens, decoded or
        PackedStates.

        Gradients end here.  Raises TBQError for states that do not fit the earlier ones.
        """
        self._append(key_states, value_states)
        states = self._states(self.start)
        if self.exact is not None:
            self.exact.trim()
        return states

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.buffers is None or self.start == self.stop and self._does_not_fit(k, v):
            self.lazy_initialization(k, v)
        elif self._does_not_fit(k, v):
            raise TBQError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} in {k.dtype} on {k.device} do not fit a cache of "
                f"{self._describe()}"
            )
        assert self.buffers
        if torch.is_grad_enabled():
            k, v = k.detach(), v.detach()
        stop = self.stop + k.shape[2]
        if stop > self.buffers[0].data.shape[1]:
            held, needed = self.stop - self.start, stop - self.start
            for buffer in self.buffers:
                buffer.make_room(self.start, self.stop, needed + max(ROOM, needed // 64) if held else needed)
            self.start, self.stop, stop = 0, held, needed
        rows = [buffer.data[:, self.stop : stop] for buffer in self.buffers]
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
                self.buffers[0].half,
                self.center.stored,
                self.center.weight,
            )
        if self.exact is not None and k.numel():
            self.exact.append(
                self.stop - self.start, [each for each, bits in zip((k, v), self.bits) if bits], self._encode_exact
            )
        self.stop = stop

    def _encode_exact(self, states: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> None:
        """Writes new keys and values, or the one of them that is packed, to slots."""
        assert self.buffers
        k_bits, v_bits = (EXACT if bits else 0 for bits in self.bits)
        _backend.backend_for(self.device).encode(
            _last_axis_contiguous(states[0]),
            slots[0] if k_bits else None,
            k_bits,
            _last_axis_contiguous(states[-1]),
            slots[-1] if v_bits else None,
            v_bits,
            self.buffers[0].half,
            self.center.stored,
        )

    def _exact_rows(self, which: int, start: int) -> ExactRows | None:
        """The exact rows of keys (0) or of values (1), of the rows from start on."""
        if self.exact is None or not self.bits[which]:
            return None
        return self.exact.rows(which if all(self.bits) else 0, self.stop - start)

    def _rows(self, which: int, start: int) -> torch.Tensor:
        assert self.buffers
        return self.buffers[which].data[:, start : self.stop]

    def _states(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.buffers
        if self.config is not None and self.config._attn_implementation == "tbq" and all(self.bits):
            k, v = self.buffers
            return (
                self._packed_states(k, self._rows(0, start), self._exact_rows(0, start)),
                self._packed_states(v, self._rows(1, start), self._exact_rows(1, start)),
            )
        return self._decoded(start)

    def _packed_states(self, side: StateBuffer, rows: torch.Tensor, exact: ExactRows | None) -> PackedStates:
        assert self.buffers
        means = (self.center.mean, self.center.stored) if side is self.buffers[0] else (None, None)
        return PackedStates(rows, side.bits, side.size, side.dtype, side.half, exact, *means)

    def _decoded(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.buffers
        k, v = self.buffers
        rows, exact = [self._rows(i, start) for i in (0, 1)], [self._exact_rows(i, start) for i in (0, 1)]
        if exact[0] is not None or exact[1] is not None or self.center.mean is not None:
            keys, values = (
                self._packed_states(side, each, some).decoded() if side.bits else each.transpose(1, 2)
                for each, side, some in zip(rows, self.buffers, exact)
            )
            return keys, values
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
        assert self.buffers
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
        assert self.buffers
        batch, _, heads, _ = self.buffers[0].data.shape
        k, v = self.buffers
        return f"batch {batch}, {heads} heads, sizes {k.size} and {v.size} in {self.dtype} on {self.device}"

    # changes of the rows

    def get_seq_length(self) -> int:
        return self.stop - self.start

    def reset(self) -> None:
        self._drop_states()

    def crop(self, length: int) -> None:
        """length < 0: removes -length tokens; > 0: keeps length tokens; 0: as in the installed transformers."""
        before = self.stop
        if length < 0 or _CROPS_BY and length == 0:
            self.stop = max(self.start, self.stop + length)
        else:
            self.stop = min(self.stop, self.start + length)
        self._crop_exact(before - self.stop)

    def _crop_exact(self, removed: int) -> None:
        if self.exact is not None and removed:
            self.exact.crop(removed, self.stop - self.start)

    def _select(self, index: torch.Tensor) -> None:
        for buffer in self.buffers or ():
            buffer.data = buffer.data.index_select(0, index.to(buffer.data.device))
        if self.exact is not None:
            self.exact.select(index)
        if self.buffers:
            self._remember_shapes()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffers:
            self._select(torch.arange(self.buffers[0].data.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffers:
            self._select(torch.arange(self.buffers[0].data.shape[0], device=indices.device)[indices])

    def offload(self) -> None:
        self._move_to("cpu")

    def prefetch(self) -> None:
        self._move_to(self.device)

    def _move_to(self, device: torch.device | str) -> None:
        for buffer in self.buffers or ():
            buffer.data = buffer.data.to(device, non_blocking=True)
        if self.exact is not None:
            self.exact.data = [data.to(device, non_blocking=True) for data in self.exact.data]

    # sizes

    def nbytes(self) -> int:
        """Bytes of the tensors, including the room to grow and the exact rows."""
        packed = sum(buffer.data.numel() * buffer.data.element_size() for buffer in self.buffers or ())
        return packed + self.exact_nbytes()

    def exact_nbytes(self) -> int:
        """Bytes of the exact rows, including their room to grow."""
        return sum(data.numel() for data in self.exact.data) if self.exact is not None else 0

    def baseline_nbytes(self) -> int:
        """Bytes of the same tokens in the model's dtype."""
        return sum(
            buffer.data.shape[0] * buffer.data.shape[2] * buffer.size * buffer.dtype.itemsize
            for buffer in self.buffers or ()
        ) * (self.stop - self.start)


class TBQSlidingLayer(TBQLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer of sliding-window attention, which keeps the rows of the last sliding_window - 1 tokens, packed.

    Its newest rows are exact, as in TBQLayer.  Its first rows are not, because the window leaves them behind.
    """

    def __init__(
        self,
        sliding_window: int,
        k_bits: int | None = 4,
        v_bits: int | None = 4,
        config: Any = None,
        half: int = 0,
        recent: int = 0,
        mean: torch.Tensor | None = None,
        energy: torch.Tensor | None = None,
    ) -> None:
        self.bits, self.half, self.config = (k_bits or 0, v_bits or 0), half, config
        self.recent, self.first = recent, 0
        self.center = _Center(mean, energy)
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.record_past = False
        self._drop_states()

    def _drop_states(self) -> None:
        super()._drop_states()
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visible = min(self.stop - self.start, self.sliding_window - 1)
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        states = self._states(self.stop - visible - key_states.shape[2])
        if self.exact is not None:
            self.exact.trim()
        if not self.record_past:
            self._trim_to_window()
        return states

    def _trim_to_window(self) -> None:
        """Drops the rows before the window; they are overwritten when the room is used up."""
        self.start = max(self.start, self.stop - self.sliding_window + 1)
        assert self.buffers
        if self.buffers[0].data.shape[1] > 2 * (self.sliding_window + ROOM):  # the room of a long prompt
            for buffer in self.buffers:
                buffer.make_room(self.start, self.stop, self.stop - self.start + ROOM)
            self.start, self.stop = 0, self.stop - self.start

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, length: int) -> None:
        removed = -length if length < 0 or _CROPS_BY and length == 0 else max(0, self.cumulative_length - length)
        held, left = self.stop - self.start, max(0, self.cumulative_length - removed)
        if held - removed < min(left, self.sliding_window - 1):
            raise TBQError(
                f"{removed} tokens cannot be removed: the window of {self.sliding_window} no longer has the tokens "
                "before them; call activate_past_recording() before adding tokens"
            )
        self.stop -= min(removed, held)
        self._crop_exact(min(removed, held))
        self.cumulative_length = left
        if self.record_past and self.buffers:
            self._trim_to_window()


def _refuse_assignment(value: object) -> None:
    if value is not None:
        raise TBQError("keys and values of a TBQLayer cannot be assigned; they are set by update()")


def _check_states(k: torch.Tensor, v: torch.Tensor) -> None:
    for name, states in (("keys", k), ("values", v)):
        if states.ndim != 4 or states.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TBQError(
                f"{name} are {states.dtype} of shape {tuple(states.shape)}; they must be float32, float16 or bfloat16 "
                "of shape (batch, heads, tokens, size)"
            )
    _backend.backend_for(k.device)


def _last_axis_contiguous(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(3) == 1 else states.contiguous()


#: crop(n) removes n tokens in transformers 5, and keeps n tokens in transformers 4.
_CROPS_BY = "max_length" not in DynamicLayer.crop.__code__.co_varnames
