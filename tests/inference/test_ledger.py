"""The depth ledger against a list of every position's depth."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.inference.ledger import DepthLedger

DEPTHS = (0, 2, 5, 6, 8)
EXITS = (2, 5, 6)
BLOCKS = (2, 6)


@dataclass
class Positions:
    """One sequence, written out: of each position the layers that it has run, and whether each block has seen it."""

    depths: list[int] = field(default_factory=list)
    in_block: dict[int, list[bool]] = field(default_factory=lambda: {layer: [] for layer in BLOCKS})

    def waiting(self, start: int, stop: int) -> list[int]:
        return [position for position, depth in enumerate(self.depths) if start <= depth < stop]

    def wait_between(self, start: int, stop: int) -> bool:
        return any(start < depth < stop for depth in self.depths)


def _segments() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.sampled_from(DEPTHS), st.sampled_from(DEPTHS)).filter(lambda pair: pair[0] < pair[1])


def _act(data: st.DataObject, ledger: DepthLedger, sequence: int, naive: Positions) -> None:
    """One thing that happens to a sequence, to both."""
    match data.draw(st.sampled_from(["append", "advance", "advance", "block", "truncate"])):
        case "append":
            count, length = data.draw(st.integers(0, 4)), len(naive.depths)
            assert ledger.append(sequence, count) == range(length, length + count)
            naive.depths += [0] * count
            for seen in naive.in_block.values():
                seen += [False] * count
        case "advance":
            start, stop = data.draw(_segments())
            if not naive.wait_between(start, stop):
                waiting = naive.waiting(start, stop)
                moved = waiting[: data.draw(st.integers(0, len(waiting)))]
                assert list(ledger.advance(sequence, start, stop, len(moved))) == moved
                for position in moved:
                    naive.depths[position] = stop
        case "block":
            layer = data.draw(st.sampled_from(BLOCKS))
            seen = naive.in_block[layer]
            reached = sum(depth >= layer for depth in naive.depths)
            stop = data.draw(st.integers(sum(seen), max(sum(seen), reached)))
            ledger.advance_block(sequence, layer, range(sum(seen), stop))
            seen[:stop] = [True] * stop
        case "truncate":
            length = data.draw(st.integers(0, len(naive.depths) + 1))
            ledger.truncate(sequence, length)
            del naive.depths[length:]
            for seen in naive.in_block.values():
                del seen[length:]


def _assert_equal(ledger: DepthLedger, sequence: int, naive: Positions) -> None:
    length = len(naive.depths)
    assert ledger.length(sequence) == length
    assert [ledger.depth_of(sequence, position) for position in range(length)] == naive.depths
    assert ledger.pending(sequence) == sum(depth < DEPTHS[-1] for depth in naive.depths)
    for start in DEPTHS[:-1]:
        between = [depth for depth in naive.depths if start < depth < DEPTHS[-1]]
        assert ledger.next_waiting(sequence, start) == min(between, default=DEPTHS[-1])
    for start in DEPTHS:
        for stop in DEPTHS:
            if start < stop:
                waiting, blocked = naive.waiting(start, stop), naive.wait_between(start, stop)
                assert ledger.ready(sequence, start, stop) == (0 if blocked else len(waiting))
                if not blocked:
                    assert list(ledger.waiting(sequence, start, stop)) == waiting
    for layer, seen in naive.in_block.items():
        assert ledger.block_length(sequence, layer) == sum(seen)
    assert all(deep <= shallow for shallow, deep in pairwise(naive.depths)), "no position is deeper than one before"


@settings(max_examples=60)
@given(st.data())
def test_it_says_what_a_list_of_depths_says(data: st.DataObject) -> None:
    """Of two sequences, one of which is closed and opened again."""
    ledger = DepthLedger(DEPTHS)
    sequences: dict[int, Positions] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        sequence = data.draw(st.integers(0, 1))
        if sequence not in sequences:
            ledger.open(sequence, blocks=BLOCKS)
            sequences[sequence] = Positions()
        elif sequence == 1 and data.draw(st.integers(0, 9)) == 0:
            ledger.close(sequence)
            del sequences[sequence]
        else:
            _act(data, ledger, sequence, sequences[sequence])
        for number, naive in sequences.items():
            _assert_equal(ledger, number, naive)


def _ledger(*, length: int = 4) -> DepthLedger:
    ledger = DepthLedger(DEPTHS)
    ledger.open(7, blocks=[2])
    ledger.append(7, length)
    return ledger


def test_what_would_break_its_order_is_refused() -> None:
    ledger = _ledger()
    ledger.advance(7, 0, 2, 3)
    with pytest.raises(AssertionError):
        ledger.advance(7, 0, 8, 1)  # three wait at 2
    with pytest.raises(AssertionError):
        ledger.advance(7, 2, 5, 4)  # there are three
    with pytest.raises(AssertionError, match="left out"):
        ledger.advance_block(7, 2, range(1, 2))
    with pytest.raises(AssertionError, match="ahead of its exit"):
        ledger.advance_block(7, 2, range(4))
    with pytest.raises(AssertionError, match="there already"):
        ledger.open(7)
    with pytest.raises(AssertionError):
        DepthLedger((0, 5, 2, 8))


def test_only_blocks_that_a_sequence_asks_are_kept() -> None:
    ledger = _ledger()
    ledger.open(8)
    assert ledger.has_block(7, 2) and not ledger.has_block(7, 6) and not ledger.has_block(8, 2)


def test_truncating_takes_back_what_is_deep_and_leaves_what_waits() -> None:
    """A draft is rolled back: two positions have run to the end, two wait, three are taken back."""
    ledger = _ledger()
    ledger.advance(7, 0, 2, 4)
    ledger.advance_block(7, 2, range(4))
    ledger.advance(7, 2, 8, 2)
    ledger.truncate(7, 1)
    assert (ledger.length(7), ledger.pending(7), ledger.block_length(7, 2)) == (1, 0, 1)
    assert ledger.append(7, 2) == range(1, 3)
    assert ledger.waiting(7, 0, 2) == range(1, 3)
