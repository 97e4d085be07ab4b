"""Which blocks of a cache each sequence has: it takes them as it grows, in any order, and gives all of them back.

Plain Python but for a table, which devices copy. A sequence whose blocks follow each other is read without a copy, so
these are preferred: a slot begins at a place of its own, and goes on as long as nobody is in its way.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

BLOCK = 16
"""Positions."""


class Blocks:
    """
    Args:
        slots: sequences at most.
        num_positions: of all of them together; rounded up to whole blocks.
        size: positions of a block.

    Attributes:
        num_blocks: how many there are.
        num_positions: rounded up.
        spacing: from the place where a slot begins to that of the next one, in positions.
        table_PX: the blocks of each slot; where it has none, the number of a block that nobody ever has.
    """

    def __init__(self, slots: int, num_positions: int, size: int = BLOCK) -> None:
        self.slots, self.size, self.num_blocks = slots, size, -(-num_positions // size)
        self._share = max(1, self.num_blocks // slots)
        self.num_positions, self.spacing = self.num_blocks * size, self._share * size
        self._owner: list[int | None] = [None] * self.num_blocks
        self._of: list[list[int]] = [[] for _ in range(slots)]
        self._start: list[int | None] = [None] * slots
        self._lowest = list(range(self.num_blocks))  # free ones, and some that are not any more
        self._num_free = self.num_blocks
        self.table_PX: npt.NDArray[np.int64] = np.full((slots, self.num_blocks), self.num_blocks, dtype=np.int64)

    @property
    def num_free(self) -> int:
        """Positions in blocks that nobody has."""
        return self._num_free * self.size

    def room(self, slot: int) -> int:
        """Positions in the blocks of a slot."""
        return len(self._of[slot]) * self.size

    def missing(self, slot: int, positions: int) -> int:
        """Positions in the blocks that it would have to take for so many in all."""
        return max(0, -(-positions // self.size) * self.size - self.room(slot))

    def reserve(self, slot: int, positions: int) -> bool:
        """See that a slot has room for so many positions. False: there are not enough, and it has what it had."""
        if positions <= self.room(slot):
            return True
        count = self.missing(slot, positions) // self.size
        if count > self._num_free:
            return False
        for number in range(count):
            self._take(slot, self._next(slot, count - number))
        return True

    def release(self, slot: int) -> None:
        """Give all blocks of a slot back."""
        for block in self._of[slot]:
            self._owner[block] = None
            heappush(self._lowest, block)
        self._num_free += len(self._of[slot])
        self._of[slot], self._start[slot] = [], None
        self.table_PX[slot] = self.num_blocks
        if len(self._lowest) > 4 * self.num_blocks:  # old entries, of blocks that were taken without looking here
            self._lowest = [block for block, owner in enumerate(self._owner) if owner is None]
            heapify(self._lowest)

    def of(self, slot: int) -> Sequence[int]:
        """The blocks of a slot, in the order of its positions."""
        return tuple(self._of[slot])

    def start(self, slot: int) -> int | None:
        """The place of a slot's first position, if all others follow it; None: they don't."""
        return self._start[slot]

    def reaches(self, slot: int, length: int) -> bool:
        """Whether so many places after `start` are its own or nobody's."""
        own = self._of[slot]
        first, stop = own[-1] + 1, own[0] + -(-length // self.size)
        return stop <= self.num_blocks and all(owner is None for owner in self._owner[first:stop])

    def spacing_of(self, slots: Sequence[int], length: int) -> int | None:
        """The distance between neighbours of these sequences, of which so many positions are read from where each
        begins; None: it is not the same everywhere, or somebody else is in between."""
        starts = [self._start[slot] for slot in slots]
        first, second = starts[0], starts[1] if len(starts) > 1 else None
        if first is None or (second is None and len(starts) > 1):
            return None
        spacing = self.spacing if second is None else second - first
        if spacing <= 0 or starts != list(range(first, first + len(starts) * spacing, spacing)):
            return None
        return spacing if all(self.reaches(slot, length) for slot in slots) else None

    def places(self, slot: int, positions: range) -> Sequence[int]:
        """Where positions are among those of all blocks."""
        start = self._start[slot]
        if start is not None:
            return range(start + positions.start, start + positions.stop)
        own, size = self._of[slot], self.size
        return [own[position // size] * size + position % size for position in positions]

    def _next(self, slot: int, count: int) -> int:
        """The best block for a slot that needs so many."""
        if own := self._of[slot]:
            follower = own[-1] + 1
            return follower if self._is_free(follower) else self._lowest_free()
        home = slot * self._share
        if all(self._is_free(home + number) for number in range(count)):
            return home
        return self._run_of(count)

    def _run_of(self, count: int) -> int:
        """Where the shortest run of free blocks begins that has so many; of shorter ones the longest."""
        runs: list[tuple[int, int]] = []
        first = None
        for block in range(self.num_blocks + 1):
            if self._is_free(block):
                first = block if first is None else first
            elif first is not None:
                runs.append((block - first, first))
                first = None
        long_enough = [run for run in runs if run[0] >= count]
        return min(long_enough)[1] if long_enough else max(runs)[1]

    def _lowest_free(self) -> int:
        while True:
            block = heappop(self._lowest)
            if self._is_free(block):
                return block

    def _is_free(self, block: int) -> bool:
        return block < self.num_blocks and self._owner[block] is None

    def _take(self, slot: int, block: int) -> None:
        own = self._of[slot]
        if not own:
            self._start[slot] = block * self.size
        elif own[-1] + 1 != block:
            self._start[slot] = None
        self._owner[block] = slot
        self.table_PX[slot, len(own)] = block
        own.append(block)
        self._num_free -= 1
