"""Where the rows of a launch are: in the cache, among rotations, and among states that wait.

Shapes: N rows, B sequences, T positions attended to, M places in the cache, G key-value heads, X what a rotation turns
of each of them, D head dimension.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.model.rotary import RotationTable


class SequenceRows(NamedTuple):
    """Positions of one sequence, by its slot in the cache."""

    slot: int
    positions: range


class RowPlaces(Protocol):
    @property
    def rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [N, 1, X, D]."""
        ...

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
    if len(rows) == 1 and cache.blocks.start(rows[0].slot) is not None:
        return Neighbours(rows[0], cache, rotation)
    return Scattered(rows, cache, rotation)


class Neighbours:
    """Of one sequence whose positions follow each other in the cache: its rows are found without a list of places, and
    those of all attentions at once."""

    def __init__(self, rows: SequenceRows, cache: KeyValueCache, rotation: RotationTable) -> None:
        self._rows, self._cache = rows, cache
        self._own = slice(rows.positions.start, rows.positions.stop)
        start = cache.blocks.start(rows.slot)
        assert start is not None, "its blocks are in pieces"
        self._start = start
        self._read: Mapping[int, tuple[torch.Tensor, ...]] = {}
        self._length = 0
        self.rotation = rotation.of(self._own)

    @cached_property
    def _written(self) -> Mapping[int, torch.Tensor]:
        return self._cache.to_write(slice(self._start + self._own.start, self._start + self._own.stop))

    def positions(self) -> torch.Tensor:
        return self._cache.positions_M[self._own]

    def write(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        self._written[attention].copy_(kv_NG2D)

    def read(self, attention: int, length: int) -> tuple[torch.Tensor, ...]:
        if length != self._length:
            self._read, self._length = self._cache.to_read(slice(self._start, self._start + length)), length
        return self._read[attention]

    def among(self, room: int) -> slice | torch.Tensor:
        slot, positions = self._rows
        first = positions.start % room
        if first + len(positions) > room:
            return slot * room + self.positions() % room
        return slice(slot * room + first, slot * room + first + len(positions))


class Scattered:
    """Of several sequences."""

    def __init__(self, rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> None:
        self._rows, self._cache, self._rotations = rows, cache, rotation
        self._sequences = [slot for slot, _ in rows]
        self._spaced: Mapping[int, tuple[torch.Tensor, ...]] = {}
        self._picked_X: torch.Tensor | None = None
        self._length = 0

    # Each is made when it is first needed: sequences that attend apart from others need none of them.

    @cached_property
    def _places(self) -> torch.Tensor:
        """int64 [3, N]: slots, positions, and places in the cache."""
        slots = [slot for slot, positions in self._rows for _ in positions]
        positions = [position for _, of in self._rows for position in of]
        table = np.array([slots, positions, self._places_in_cache], dtype=np.int64)
        return torch.from_numpy(table).to(self._rotations.device)

    @cached_property
    def _places_in_cache(self) -> list[int]:
        return [place for slot, of in self._rows for place in self._cache.blocks.places(slot, of)]

    @cached_property
    def rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotations.at(self.positions())

    @cached_property
    def _written(self) -> Mapping[int, torch.Tensor] | None:
        """The rows of each attention, where they are at equal distances: a copy to them is all that a write takes."""
        places = self._places_in_cache
        spacing = places[1] - places[0] if len(places) > 1 else 1
        if spacing < 1 or places != list(range(places[0], places[0] + len(places) * spacing, spacing)):
            return None
        return self._cache.to_write(slice(places[0], places[-1] + 1, spacing))

    @cached_property
    def _written_vectors(self) -> torch.Tensor:
        return self._cache.vectors_at(self._places[2])

    def positions(self) -> torch.Tensor:
        return self._places[1]

    def write(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        if self._written is not None:
            self._written[attention].copy_(kv_NG2D)
        else:
            self._cache.vectors_of(attention).index_copy_(0, self._written_vectors, kv_NG2D.flatten(0, 2))

    def read(self, attention: int, length: int) -> tuple[torch.Tensor, ...]:
        if length != self._length:
            self._find(length)
        if self._picked_X is None:
            return self._spaced[attention]
        return self._cache.picked(attention, self._picked_X, length)

    def _find(self, length: int) -> None:
        """Where so many positions of each sequence are: as they lie, or in a copy."""
        blocks, self._length, self._picked_X = self._cache.blocks, length, None
        spacing = blocks.spacing_of(self._sequences, length)
        if spacing is not None:
            first = blocks.start(self._sequences[0])
            assert first is not None
            self._spaced = self._cache.spaced(first, spacing, len(self._sequences), length)
        else:
            blocks_BX = self._cache.blocks_of(self._sequences, length).to(self._rotations.device)
            self._picked_X = self._cache.places_of(blocks_BX, length)

    def among(self, room: int) -> torch.Tensor:
        return self._places[0] * room + self._places[1] % room
