# SPDX-License-Identifier: MIT
"""The tensors of a layer: a row for each token, and the slots of the exact rows."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tbq import _exact_rows
from tbq.errors import TBQError
from tbq.hf import _tables

#: A full layer takes room for so many tokens, or for 1/64 of its length: at most 1.6 % of the memory is unused.  Slots
#: of exact rows have room for so many more tokens, too.
ROOM = 64
#: The bits of exact rows.
EXACT = 8
#: By bits: the bytes of a block of 64 values.
BLOCK_BYTES = {**_tables.BLOCK_BYTES, EXACT: _exact_rows.BLOCK_BYTES}


@functools.cache
def channel_order(size: int, half: int) -> torch.Tensor:
    """Returns the channels of a head in the order in which they are stored: c and c + half are neighbors."""
    paired = torch.arange(2 * half).reshape(2, half).T.reshape(-1)
    return torch.cat([paired, torch.arange(2 * half, size)])


class StateBuffer:
    """The keys or the values of a layer: a row for each token, in one tensor that grows.

    bits: 2, 3 or 4, or 0 for rows in the model's dtype.  data: (batch, room, heads, bytes or size).
    half: channels c and c + half, of the first 2 half channels, are next to each other in the blocks; 0: none.
    """

    def __init__(self, bits: int, states: torch.Tensor, half: int = 0) -> None:
        batch, heads, _, size = states.shape
        if bits and (size % 64 or size == 0):
            raise TBQError(f"head size {size} is not a multiple of 64: pass k_bits=None and v_bits=None for this model")
        self.bits, self.size, self.dtype = bits, size, states.dtype
        self.half = half if bits and 2 * half <= size else 0
        self.row = size // 64 * BLOCK_BYTES[bits] if bits else size
        self.data = torch.empty(
            (batch, 0, heads, self.row), dtype=torch.uint8 if bits else states.dtype, device=states.device
        )

    def make_room(self, start: int, stop: int, room: int) -> None:
        """Moves the rows from start to stop to the front of a new tensor with `room` rows."""
        data = self.data.new_empty((self.data.shape[0], room, *self.data.shape[2:]))
        data[:, : stop - start] = self.data[:, start:stop]
        self.data = data


class ExactRows(NamedTuple):
    """The exact rows of keys or values: which slots attention reads instead of which packed rows."""

    slots: torch.Tensor  #: uint8 (batch, slots, heads, bytes), blocks of EXACT bits
    first: int  #: slots 0 ... first - 1 hold the rows 0 ... first - 1
    newest: int  #: slots from here on hold the newest rows; the last slot has the last row.  Those between are unused.

    @property
    def n_newest(self) -> int:
        return self.slots.shape[1] - self.newest

    def cell_shift(self, n_kv: int) -> int:
        """What is added to a slot of the newest rows to get its row, of n_kv."""
        return n_kv - self.slots.shape[1]


class ExactSlots:
    """The exact rows of a layer, beside its packed ones: its first rows and its newest ones.

    Their slots are rows of 8 bits, one tensor for the keys and one for the values, or for the one that is packed.
    Slots 0 ... first - 1 are for the first rows.  Behind them the newest rows lie in order, from `begin` to `end`, and
    free slots.  Where these are used up, what is kept moves to a new tensor, so that earlier views stay valid.
    Rows that are cropped, and rows that were dropped before, are read packed: never wrong, only less exact.
    """

    def __init__(self, recent: int, first: int, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        """shapes: batch, heads and head size of each tensor."""
        self.recent, self.first = recent, first
        self.data = [
            torch.empty((batch, first, heads, size // 64 * BLOCK_BYTES[EXACT]), dtype=torch.uint8, device=device)
            for batch, heads, size in shapes
        ]
        self.n_first = 0  #: slots of first rows in use
        self.begin = self.end = first  #: slots of the newest rows
        self.n_read = 0  #: how many of these attention reads

    def append(
        self,
        at: int,
        states: Sequence[torch.Tensor],
        encode: Callable[[Sequence[torch.Tensor], list[torch.Tensor]], None],
    ) -> None:
        """Stores new rows, (batch, heads, tokens, size) for each tensor, and reads all of them until trim().

        at: cached rows before these.  encode: writes states to slots.
        """
        if not self.recent:  # only those of the first rows
            states = [each[:, :, : max(0, self.first - at)] for each in states]
        tokens = states[0].shape[2]
        if not tokens:
            return
        before = min(self.end - self.begin, max(0, self.recent - 1))
        to = self.end if self.recent else at
        if self.recent and self.end + tokens > self.data[0].shape[1]:
            self._move(before, tokens + (ROOM if tokens <= ROOM else 0))
            to = self.end
        slots = [data[:, to : to + tokens] for data in self.data]
        encode(states, slots)
        if self.recent:
            self.end += tokens
            self.n_read = before + tokens
        if at < self.first:
            self.n_first = min(self.first, at + tokens)
            if self.recent:
                for data, new in zip(self.data, slots):
                    data[:, at : self.n_first] = new[:, : self.n_first - at]

    def trim(self) -> None:
        """Reads no more than `recent` of the newest rows from now on, and frees the memory of a prompt's."""
        self.n_read = min(self.end - self.begin, self.recent)
        if self.data[0].shape[1] > self.first + self.recent + 2 * ROOM:
            self._move(self.n_read, ROOM)

    def _move(self, kept: int, room: int) -> None:
        """Moves the newest `kept` rows to new tensors with room for `room` more."""
        for i, data in enumerate(self.data):
            moved = data.new_empty((data.shape[0], self.first + kept + room, *data.shape[2:]))
            moved[:, : self.n_first] = data[:, : self.n_first]
            moved[:, self.first : self.first + kept] = data[:, self.end - kept : self.end]
            self.data[i] = moved
        self.begin, self.end = self.first, self.first + kept

    def rows(self, which: int, n_kv: int) -> ExactRows | None:
        """What attention to the last n_kv rows reads of a tensor; None if it is nothing.

        n_kv is below the number of cached rows for sliding windows only, which have no first rows.
        """
        newest = min(self.n_read, n_kv - self.n_first)
        if not newest and not self.n_first:
            return None
        return ExactRows(self.data[which][:, : self.end], self.n_first, self.end - newest)

    def crop(self, removed: int, left: int) -> None:
        """Forgets the last `removed` rows of what were removed + left."""
        self.end = max(self.begin, self.end - removed)
        self.n_first = min(self.n_first, left)
        self.n_read = min(self.end - self.begin, self.recent)

    def select(self, index: torch.Tensor) -> None:
        """Selects sequences of the batch."""
        self.data = [data.index_select(0, index.to(data.device)) for data in self.data]
