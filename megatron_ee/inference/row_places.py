"""Where the rows of a launch are: in the cache, among rotations, and among states that wait.

Shapes: N rows, B sequences, T positions attended to, P slots, C capacity, G key-value heads, X what a rotation turns of
each of them, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.model.rotary import RotationTable


class SequenceRows(NamedTuple):
    """Positions of one sequence, by its slot in the cache."""

    slot: int
    positions: range


class RowPlaces(Protocol):
    """
    Attributes:
        rotation: cosine and sine, each [N, 1, X, D].
    """

    rotation: tuple[torch.Tensor, torch.Tensor]

    def positions(self) -> torch.Tensor:
        """int64 [N], on the device."""
        ...

    def write(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        """Put the rows' keys and values into the cache."""
        ...

    def read(self, attention: int, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of the first positions of their sequences, each [B, G, T, D]."""
        ...

    def among(self, room: int) -> slice | torch.Tensor:
        """Where they are in a list that has room for so many positions of each slot. A position takes the place of the
        one `room` before it."""
        ...


def places_of(rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> RowPlaces:
    return Neighbours(rows[0], cache, rotation) if len(rows) == 1 else Scattered(rows, cache, rotation)


class Neighbours:
    """Of one sequence: its rows follow each other wherever they are, and are found without a list of places."""

    def __init__(self, rows: SequenceRows, cache: KeyValueCache, rotation: RotationTable) -> None:
        self._rows, self._cache = rows, cache
        self._own = slice(rows.positions.start, rows.positions.stop)
        self.rotation = rotation.of(self._own)

    def positions(self) -> torch.Tensor:
        return self._cache.positions_C[self._own]

    def write(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        own_G2ND = self._cache.of(attention)[self._rows.slot, :, :, self._own]
        own_G2ND.copy_(kv_NG2D.permute(1, 2, 0, 3))

    def read(self, attention: int, length: int) -> tuple[torch.Tensor, ...]:
        slot = self._rows.slot
        return self._cache.of(attention)[slot : slot + 1, :, :, :length].unbind(2)

    def among(self, room: int) -> slice | torch.Tensor:
        slot, positions = self._rows
        first = positions.start % room
        if first + len(positions) > room:
            return slot * room + self.positions() % room
        return slice(slot * room + first, slot * room + first + len(positions))


class Scattered:
    """Of several sequences."""

    def __init__(self, rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> None:
        self._cache = cache
        slots = [slot for slot, positions in rows for _ in positions]
        places = [place for _, positions in rows for place in positions]
        self._slots_N, self._positions_N = torch.tensor([slots, places], device=rotation.device)
        self.rotation = rotation.at(self._positions_N)
        self._written_NX = cache.places(self._slots_N, self._positions_N)
        self._read = _Read.of([slot for slot, _ in rows], rotation.device)

    def positions(self) -> torch.Tensor:
        return self._positions_N

    def write(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        self._cache.vectors_of(attention).index_copy_(0, self._written_NX, kv_NG2D.flatten(0, 2))

    def read(self, attention: int, length: int) -> tuple[torch.Tensor, ...]:
        return self._read.from_(self._cache.of(attention), length)

    def among(self, room: int) -> torch.Tensor:
        return self._slots_N * room + self._positions_N % room


class _Read(NamedTuple):
    """Which slots of the cache a launch reads: neighbours without a copy, others by a copy."""

    first: int
    stop: int
    picked_B: torch.Tensor | None

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device) -> "_Read":
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            return cls(slots[0], slots[-1] + 1, None)
        return cls(0, 0, torch.tensor(slots, device=device))

    def from_(self, room_PG2CD: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values, each [B, G, T, D]."""
        if self.picked_B is None:
            return room_PG2CD[self.first : self.stop, :, :, :length].unbind(2)
        return room_PG2CD[:, :, :, :length].index_select(0, self.picked_B).unbind(2)
