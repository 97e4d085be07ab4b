"""Sequences of one launch attend as each does alone, and those with few rows are not made as long as the longest."""

from collections.abc import Sequence

import pytest
import torch
from helpers.models import whole_model
from inference.test_row_places import CAPACITY, cache_of

from megatron_ee.inference.launch import Launch
from megatron_ee.inference.row_places import SequenceRows
from megatron_ee.model.rotary import Rotary, RotationTable
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def stage(mesh: Mesh) -> Stage:
    return whole_model(mesh, exits=[2, 5], dtype=torch.float64)


def attended(stage: Stage, launches: Sequence[Sequence[SequenceRows]], qkv: dict[int, torch.Tensor]) -> torch.Tensor:
    """Of all rows of launches that come one after the other, in a cache where every position has something."""
    cache, torch_state = cache_of(stage, "in pieces"), torch.Generator().manual_seed(0)
    table = RotationTable(Rotary(stage.model, "cpu"), CAPACITY, cache.group, torch.float64, torch.device("cpu"))
    whole = Launch([SequenceRows(slot, range(CAPACITY)) for slot in qkv], cache, table)
    before = torch.randn(3 * CAPACITY, *qkv[0].shape[1:], dtype=torch.float64, generator=torch_state)
    whole.attend(1, before, scale=0.3)
    contexts = []
    for rows in launches:
        of_rows = torch.cat([qkv[slot][positions.start : positions.stop] for slot, positions in rows])
        contexts.append(Launch(rows, cache, table).attend(1, of_rows, scale=0.3))
    return torch.cat(contexts)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 12, 1), (9, 1, 2), (2, 3, 4), (12, 11, 1)])
def test_sequences_of_a_launch_attend_as_each_does_alone(stage: Stage, counts: tuple[int, ...]) -> None:
    generator, model = torch.Generator().manual_seed(1), stage.model
    groups, head_dim = model.num_key_value_heads, model.hidden_size // model.num_attention_heads
    assert groups is not None
    shape = (CAPACITY, groups, model.num_attention_heads // groups + 2, head_dim)
    qkv = {slot: torch.randn(*shape, dtype=torch.float64, generator=generator) for slot in range(3)}
    stops = (CAPACITY, CAPACITY - 1, CAPACITY)
    rows = [
        SequenceRows(slot, range(max(0, stop - count), stop))
        for slot, (stop, count) in enumerate(zip(stops, counts, strict=True))
    ]
    together = attended(stage, [rows], qkv)
    torch.testing.assert_close(together, attended(stage, [[of] for of in rows], qkv), rtol=1e-12, atol=1e-12)
    assert together.abs().sum() > 0


def test_one_long_sequence_does_not_make_the_others_long(stage: Stage) -> None:
    cache = cache_of(stage)
    table = RotationTable(Rotary(stage.model, "cpu"), CAPACITY, cache.group, torch.float64, torch.device("cpu"))
    rows = [SequenceRows(0, range(10, 11)), SequenceRows(1, range(12)), SequenceRows(2, range(4, 5))]
    groups = Launch(rows, cache, table)._groups
    assert [[of.slot for of in group.launch.rows] for group in groups] == [[0, 2], [1]]
    assert [group.rows_N.tolist() for group in groups] == [[0, 13], list(range(1, 13))]
    assert not Launch(rows[::2], cache, table)._groups
