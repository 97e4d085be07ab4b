"""Rows of one sequence, which are found by slices, are where a list of places says."""

from itertools import product

import pytest
import torch
from helpers.models import whole_model

from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.row_places import Neighbours, RowPlaces, Scattered, SequenceRows, places_of
from megatron_ee.model.rotary import Rotary, RotationTable
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

CAPACITY = 12


@pytest.fixture(scope="module")
def stage(mesh: Mesh) -> Stage:
    return whole_model(mesh, exits=[2, 5], dtype=torch.float64)


ORDERS = {
    "one after the other": {0: [0, 1, 2], 1: [3, 4, 5], 2: [6, 7, 8]},
    "in pieces": {0: [8, 1, 4], 1: [0, 2, 6], 2: [3, 7, 5]},
}


def cache_of(stage: Stage, order: str = "one after the other") -> KeyValueCache:
    """Of three sequences, which have blocks of four positions."""
    blocks = Blocks(3, 3 * CAPACITY, 4)
    for slot, own in ORDERS[order].items():
        for block in own:
            blocks._take(slot, block)
    return KeyValueCache(stage, blocks)


def all_kinds(stage: Stage, rows: SequenceRows) -> list[tuple[KeyValueCache, RowPlaces]]:
    """By slices; by a list of the same places; and by a list where the sequence is in pieces."""
    found: list[tuple[KeyValueCache, RowPlaces]] = []
    for kind, order in (
        (lambda *of: Neighbours(rows, *of), "one after the other"),
        (lambda *of: Scattered([rows], *of), "one after the other"),
        (lambda *of: Scattered([rows], *of), "in pieces"),
    ):
        cache = cache_of(stage, order)
        found.append((cache, kind(cache, rotation_of(stage, cache))))
    return found


def rotation_of(stage: Stage, cache: KeyValueCache) -> RotationTable:
    device = torch.device("cpu")
    return RotationTable(Rotary(stage.model, device), CAPACITY, cache.group, torch.float64, device)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("positions", [range(1), range(5), range(7, 8), range(7, 12)], ids=str)
def test_slices_and_lists_of_places_are_the_same(stage: Stage, slot: int, positions: range) -> None:
    (cache, ours), *others = all_kinds(stage, SequenceRows(slot, positions))
    kv_NG2D = torch.randn(len(positions), cache.heads, 2, stage.config.kv_channels, dtype=torch.float64)
    for attention in (1, 3):
        ours.write(attention, attention * kv_NG2D)
    assert ours.positions().tolist() == list(positions)
    for expected_cache, expected in others:
        for attention in (1, 3):
            expected.write(attention, attention * kv_NG2D)
        assert torch.equal(ours.positions(), expected.positions())
        for part, other in zip(ours.rotation, expected.rotation, strict=True):
            assert torch.equal(part, other)
        for attention, length in product(cache.windows, (positions.stop, CAPACITY)):
            for part, other in zip(ours.read(attention, length), expected.read(attention, length), strict=True):
                assert torch.equal(part, other)
                assert part.any() == (attention in (1, 3))
        for attention, of_slot in product(cache.windows, range(3)):
            of_slots = (of.read(attention, of_slot, CAPACITY) for of in (cache, expected_cache))
            for part, other in zip(*of_slots, strict=True):
                assert torch.equal(part, other)
                assert part.any() == (of_slot == slot and attention in (1, 3))


@pytest.mark.parametrize("room", [5, 7, CAPACITY])
@pytest.mark.parametrize("positions", [range(3), range(4, 5), range(4, 7), range(7, 12)], ids=str)
def test_states_wait_where_those_of_a_room_before_them_did(stage: Stage, room: int, positions: range) -> None:
    """In one piece, or in two where the room ends between them."""
    list_of_all = torch.arange(3 * room)
    for _, places in all_kinds(stage, SequenceRows(2, positions)):
        assert list_of_all[places.among(room)].tolist() == [2 * room + position % room for position in positions]


def test_one_sequence_is_found_by_slices_and_several_or_one_in_pieces_by_lists(stage: Stage) -> None:
    cache, pieces = (cache_of(stage, order) for order in ORDERS)
    rows = [SequenceRows(0, range(2, 4)), SequenceRows(2, range(5, 6))]
    assert isinstance(places_of(rows[:1], cache, rotation_of(stage, cache)), Neighbours)
    assert isinstance(places_of(rows, cache, rotation_of(stage, cache)), Scattered)
    assert isinstance(places_of(rows[:1], pieces, rotation_of(stage, pieces)), Scattered)


@pytest.mark.parametrize("slots", [[0, 1], [0, 1, 2], [1, 2], [0, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("length", [3, 9, CAPACITY])
def test_sequences_are_read_the_same_wherever_their_blocks_are(stage: Stage, slots: list[int], length: int) -> None:
    """Where they begin at equal distances, without a copy; nobody sees what is another's."""
    read: list[tuple[torch.Tensor, ...]] = []
    for order in ORDERS:
        cache = cache_of(stage, order)
        for slot in range(3):
            generator = torch.Generator().manual_seed(slot)
            for part_GTD in cache.read(3, slot, CAPACITY):
                if isinstance(cache.where(slot, range(CAPACITY)), slice):
                    part_GTD.copy_(torch.randn(part_GTD.shape, generator=generator, dtype=part_GTD.dtype))
            if not isinstance(where := cache.where(slot, range(CAPACITY)), slice):
                for part in range(2):
                    shape = (cache.heads, CAPACITY, stage.config.kv_channels)
                    cache.of(3)[0, :, part, where] = torch.randn(shape, generator=generator, dtype=torch.float64)
        places = Scattered([SequenceRows(slot, range(length)) for slot in slots], cache, rotation_of(stage, cache))
        read.append(places.read(3, length))
        for part_BGTD in read[-1]:
            assert part_BGTD.shape == (len(slots), cache.heads, length, stage.config.kv_channels)
        for number, slot in enumerate(slots):
            for part_BGTD, own_GTD in zip(read[-1], cache.read(3, slot, length), strict=True):
                assert torch.equal(part_BGTD[number], own_GTD)
    for ours_BGTD, theirs_BGTD in zip(*read, strict=True):
        assert torch.equal(ours_BGTD, theirs_BGTD)


def test_beyond_its_end_a_sequence_reads_zeros_and_nothing_of_anybody_else(stage: Stage) -> None:
    """What is no number in a neighbour would be none in the sum that leaves it out."""
    blocks = Blocks(3, 3 * CAPACITY, 4)
    for slot, block in ((0, 0), (1, 3), (2, 1), (2, 2)):
        blocks._take(slot, block)
    cache = KeyValueCache(stage, blocks)
    for part in cache.read(3, 2, 8):
        part.fill_(torch.nan)
    places = Scattered([SequenceRows(0, range(3)), SequenceRows(1, range(4))], cache, rotation_of(stage, cache))
    assert blocks.spacing_of([0, 1], 4) == 12
    assert blocks.spacing_of([0, 1], 5) is None
    for part_BGTD in places.read(3, 7):
        assert not part_BGTD.any()


@pytest.mark.parametrize("order", ORDERS)
def test_no_positions_are_nowhere(stage: Stage, order: str) -> None:
    keys_GTD, values_GTD = cache_of(stage, order).read(3, 1, 0)
    assert keys_GTD.shape[1] == values_GTD.shape[1] == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "rows",
    [
        {0: range(2, 3), 1: range(2, 3), 2: range(2, 3)},
        {0: range(4, 6), 1: range(3, 5), 2: range(4, 6)},
        {2: range(1, 2), 0: range(1, 2)},
        {1: range(12)},
        {0: range(11, 12), 1: range(2)},
    ],
    ids=str,
)
def test_what_rows_write_is_theirs_wherever_they_are(stage: Stage, order: str, rows: dict[int, range]) -> None:
    """At equal distances, by a copy to them, or one by one; nothing else is touched."""
    cache = cache_of(stage, order)
    places = Scattered([SequenceRows(*of) for of in rows.items()], cache, rotation_of(stage, cache))
    kv_NG2D = torch.randn(places.positions().numel(), cache.heads, 2, stage.config.kv_channels, dtype=torch.float64)
    places.write(3, kv_NG2D)
    before = 0
    for slot, positions in rows.items():
        written_GND = kv_NG2D[before : before + len(positions)].permute(2, 1, 0, 3)
        for part_GTD, own_GND in zip(cache.read(3, slot, CAPACITY), written_GND, strict=True):
            assert torch.equal(part_GTD[:, positions.start : positions.stop], own_GND)
        before += len(positions)
    assert cache.of(3).count_nonzero() == kv_NG2D.numel()
    assert not cache.of(1).any()
