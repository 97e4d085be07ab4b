"""How deep every position of every sequence has been: whose keys and values are there, and whose are not."""

from collections.abc import Collection, Sequence
from itertools import pairwise


class DepthLedger:
    """Counts of leading positions. No position is ever deeper than one before it: what goes deeper takes along all that
    wait before it. So one number says of a depth which positions have reached it.

    A position's keys and values are there in every layer that it has run. The blocks of exit heads that attend have
    keys and values too, in the sequences that ask these exits.

    Args:
        depths: where positions may wait, in layers run: 0, the model's exits, and the number of its layers.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        assert all(shallow < deep for shallow, deep in pairwise(depths)), depths
        self._depths = tuple(depths)
        self._reached: dict[int, dict[int, int]] = {}
        self._blocks: dict[int, dict[int, int]] = {}

    def open(self, sequence: int, *, blocks: Collection[int] = ()) -> None:
        """Begin a sequence without positions.

        Args:
            blocks: the exits that it asks and whose heads attend, by their layers.
        """
        assert sequence not in self._reached, f"sequence {sequence} is there already"
        self._reached[sequence] = dict.fromkeys(self._depths, 0)
        self._blocks[sequence] = dict.fromkeys(blocks, 0)

    def close(self, sequence: int) -> None:
        """Forget a sequence."""
        del self._reached[sequence], self._blocks[sequence]

    def length(self, sequence: int) -> int:
        """Number of positions, run or not."""
        return self._reached[sequence][0]

    def pending(self, sequence: int) -> int:
        """Number of positions that lack keys and values somewhere."""
        return self.length(sequence) - self._reached[sequence][self._depths[-1]]

    def depth_of(self, sequence: int, position: int) -> int:
        """Layers that a position has run."""
        reached = self._reached[sequence]
        return max(depth for depth in self._depths if position < reached[depth] or depth == 0)

    def append(self, sequence: int, count: int) -> range:
        """New positions, which have run nothing yet."""
        start = self.length(sequence)
        self._reached[sequence][0] += count
        return range(start, start + count)

    def num_waiting(self, sequence: int, depth: int) -> int:
        """How many positions have run so many layers and no more."""
        reached = self._reached[sequence]
        return reached[depth] - next(reached[deeper] for deeper in self._depths if deeper > depth)

    def waiting(self, sequence: int, start: int, stop: int) -> range:
        """Positions that have run `start` layers and would run up to `stop` next; none wait between."""
        reached = self._reached[sequence]
        assert all(reached[depth] == reached[stop] for depth in self._depths if start < depth < stop), reached
        return range(reached[stop], reached[start])

    def next_waiting(self, sequence: int, start: int) -> int:
        """The first depth beyond `start` at which positions wait, or the last of all."""
        reached = self._reached[sequence]
        later = [depth for depth in self._depths if depth > start]
        return next((depth for depth, after in pairwise(later) if reached[depth] > reached[after]), later[-1])

    def ready(self, sequence: int, start: int, stop: int) -> int:
        """How many positions wait at `start` and could run up to `stop`: none while others wait between."""
        reached = self._reached[sequence]
        first = min(depth for depth in self._depths if depth > start)
        return reached[start] - reached[stop] if reached[first] == reached[stop] else 0

    def advance(self, sequence: int, start: int, stop: int, count: int) -> range:
        """Positions, the first of those that wait at `start`, have now run up to `stop`. Returns them."""
        positions = self.waiting(sequence, start, stop)[:count]
        assert len(positions) == count, f"{count} of {positions}"
        for depth in self._depths:
            if start < depth <= stop:
                self._reached[sequence][depth] += count
        return positions

    def advance_block(self, sequence: int, exit_layer: int, positions: range) -> None:
        """The block of an exit's head has been run at positions; each comes after the one before."""
        assert self._blocks[sequence][exit_layer] == positions.start, "a position of a block is left out"
        assert positions.stop <= self._reached[sequence][exit_layer], "a block is ahead of its exit"
        self._blocks[sequence][exit_layer] = positions.stop

    def has_block(self, sequence: int, exit_layer: int) -> bool:
        """Whether the sequence asks this exit's block."""
        return exit_layer in self._blocks[sequence]

    def attending(self, sequence: int) -> tuple[int, ...]:
        """The exits whose blocks the sequence asks."""
        return tuple(self._blocks[sequence])

    def block_length(self, sequence: int, exit_layer: int) -> int:
        """Leading positions whose keys and values the block has."""
        return self._blocks[sequence][exit_layer]

    def truncate(self, sequence: int, length: int) -> range:
        """Take positions back, the last ones first. Returns them."""
        taken_back = range(length, self.length(sequence))
        for counts in (self._reached[sequence], self._blocks[sequence]):
            counts.update({depth: min(count, length) for depth, count in counts.items()})
        return taken_back
