"""Rows of one sequence, which are found by slices, are where a list of places says."""

from itertools import product

import pytest
import torch
from helpers.models import whole_model

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.row_places import Neighbours, RowPlaces, Scattered, SequenceRows, places_of
from megatron_ee.model.rotary import Rotary, RotationTable
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

CAPACITY = 12


@pytest.fixture(scope="module")
def stage(mesh: Mesh) -> Stage:
    return whole_model(mesh, exits=[2, 5], dtype=torch.float64)


def both(stage: Stage, rows: SequenceRows) -> list[tuple[KeyValueCache, RowPlaces]]:
    found: list[tuple[KeyValueCache, RowPlaces]] = []
    for kind in (lambda *of: Neighbours(rows, *of), lambda *of: Scattered([rows], *of)):
        cache = KeyValueCache(stage, 3, CAPACITY)
        found.append((cache, kind(cache, rotation_of(stage, cache))))
    return found


def rotation_of(stage: Stage, cache: KeyValueCache) -> RotationTable:
    device = torch.device("cpu")
    return RotationTable(Rotary(stage.model, device), CAPACITY, cache.group, torch.float64, device)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("positions", [range(1), range(5), range(7, 8), range(7, 12)], ids=str)
def test_slices_and_lists_of_places_are_the_same(stage: Stage, slot: int, positions: range) -> None:
    (cache, ours), (expected_cache, expected) = both(stage, SequenceRows(slot, positions))
    assert torch.equal(ours.positions(), expected.positions())
    assert ours.positions().tolist() == list(positions)
    for part, other in zip(ours.rotation, expected.rotation, strict=True):
        assert torch.equal(part, other)
    kv_NG2D = torch.randn(len(positions), cache.heads, 2, stage.config.kv_channels, dtype=torch.float64)
    for places in (ours, expected):
        places.write(3, kv_NG2D)
    for attention, length in product((3, 4), (positions.stop, CAPACITY)):
        for part, other in zip(ours.read(attention, length), expected.read(attention, length), strict=True):
            assert torch.equal(part, other)
    for of_slot in range(3):
        for part, other in zip(
            cache.read(3, of_slot, CAPACITY), expected_cache.read(3, of_slot, CAPACITY), strict=True
        ):
            assert torch.equal(part, other)
            assert part.any() == (of_slot == slot)


@pytest.mark.parametrize("room", [5, 7, CAPACITY])
@pytest.mark.parametrize("positions", [range(3), range(4, 5), range(4, 7), range(7, 12)], ids=str)
def test_states_wait_where_those_of_a_room_before_them_did(stage: Stage, room: int, positions: range) -> None:
    """In one piece, or in two where the room ends between them."""
    list_of_all = torch.arange(3 * room)
    for _, places in both(stage, SequenceRows(2, positions)):
        assert list_of_all[places.among(room)].tolist() == [2 * room + position % room for position in positions]


def test_one_sequence_is_found_by_slices_and_several_by_lists(stage: Stage) -> None:
    cache = KeyValueCache(stage, 3, CAPACITY)
    rows = [SequenceRows(0, range(2, 4)), SequenceRows(2, range(5, 6))]
    assert isinstance(places_of(rows[:1], cache, rotation_of(stage, cache)), Neighbours)
    assert isinstance(places_of(rows, cache, rotation_of(stage, cache)), Scattered)
