"""Blocks of keys and values: nobody has another's, none is lost, and a table says the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.inference.blocks import Blocks


def assert_consistent(blocks: Blocks) -> None:
    slots = range(blocks.slots)
    taken = [block for slot in slots for block in blocks.of(slot)]
    assert len(set(taken)) == len(taken), "a block has two owners"
    assert blocks.num_free == (blocks.num_blocks - len(taken)) * blocks.size, "a block is lost"
    for slot in slots:
        own = list(blocks.of(slot))
        row = blocks.table_PX[slot].tolist()
        assert row == own + [blocks.num_blocks] * (blocks.num_blocks - len(own))
        expected = [block * blocks.size + place for block in own for place in range(blocks.size)]
        assert list(blocks.places(slot, range(len(expected)))) == expected
        follow_each_other = own == list(range(own[0], own[0] + len(own))) if own else False
        assert blocks.start(slot) == (own[0] * blocks.size if follow_each_other else None)
        if follow_each_other:
            for length in (1, len(expected), len(expected) + 1, len(expected) + 3 * blocks.size):
                region = range(own[0], own[0] + -(-length // blocks.size))
                others = set(taken) - set(own)
                is_free = region.stop <= blocks.num_blocks and not others & set(region)
                assert blocks.reaches(slot, length) == is_free


@settings(max_examples=200)
@given(data=st.data())
def test_any_order_of_growing_and_leaving(data: st.DataObject) -> None:
    slots, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    blocks = Blocks(slots, data.draw(st.integers(1, 60)), size)
    lengths = dict.fromkeys(range(slots), 0)
    for _ in range(data.draw(st.integers(1, 60))):
        slot = data.draw(st.integers(0, slots - 1))
        if data.draw(st.integers(0, 4)) == 0:
            blocks.release(slot)
            lengths[slot] = 0
        else:
            wanted = lengths[slot] + data.draw(st.integers(0, 12))
            missing, free = blocks.missing(slot, wanted), blocks.num_free
            if blocks.reserve(slot, wanted):
                assert missing <= free
                lengths[slot] = max(lengths[slot], wanted)
                assert blocks.num_free == free - missing
            else:
                assert missing > free == blocks.num_free, "only where there is too little, and nothing has changed"
        assert blocks.room(slot) >= lengths[slot]
        assert_consistent(blocks)
    for slot in range(slots):
        blocks.release(slot)
    assert blocks.num_free == blocks.num_positions


def test_sequences_that_fit_into_their_shares_begin_at_equal_distances_and_are_whole() -> None:
    blocks = Blocks(4, 4 * 32, 8)
    for length in range(1, 33):
        for slot in (2, 0, 3, 1):
            assert blocks.reserve(slot, length)
    assert [blocks.start(slot) for slot in range(4)] == [0, 32, 64, 96]
    assert blocks.spacing_of([0, 1, 2, 3], 32) == blocks.spacing == 32
    assert blocks.spacing_of([1, 3], 20) == 64
    assert blocks.spacing_of([3, 1], 20) is None
    assert blocks.num_free == 0


@pytest.mark.parametrize("length", [20, 32, 41, 64])
def test_who_needs_more_than_a_share_gets_it_in_one_piece_where_there_is_one(length: int) -> None:
    blocks = Blocks(4, 4 * 16, 4)
    assert blocks.reserve(3, length)
    assert blocks.start(3) is not None


def test_who_comes_between_is_not_read_with_others() -> None:
    blocks = Blocks(3, 3 * 8, 4)
    assert all(blocks.reserve(slot, 4) for slot in (0, 2))
    assert blocks.spacing_of([0, 2], 8) == 16
    assert blocks.reserve(1, 16), "it takes its own two, and one of each of the others"
    assert blocks.spacing_of([0, 2], 4) == 16
    assert blocks.spacing_of([0, 2], 8) is None
    assert blocks.start(1) is None
