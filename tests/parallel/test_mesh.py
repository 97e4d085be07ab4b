"""Which rank holds what."""

import os

import pytest
from helpers.one_step import one_step
from helpers.ranks import RankPool
from helpers.tiny import tiny_config

from megatron_ee.config import ParallelConfig
from megatron_ee.device import choose_device
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.world import MeshError, data_parallel_size


def _place() -> tuple[int, int, list[int], bool]:
    mesh = open_mesh(ParallelConfig(pipeline=2), choose_device("cpu"))
    return mesh.pipeline_rank, mesh.data_rank, mesh.pipeline_ranks, mesh.is_main


def test_stages_are_outermost(ranks: RankPool) -> None:
    assert ranks.run(4, _place) == [
        (0, 0, [0, 2], True),
        (0, 1, [1, 3], False),
        (1, 0, [0, 2], False),
        (1, 1, [1, 3], False),
    ]


def _place_in_three_dimensions() -> tuple[int, int, int, list[int]]:
    mesh = open_mesh(ParallelConfig(tensor=2, pipeline=2), choose_device("cpu"))
    assert (mesh.groups.tp.rank(), mesh.groups.pp.rank()) == (mesh.tensor_rank, mesh.pipeline_rank)
    return mesh.tensor_rank, mesh.data_rank, mesh.pipeline_rank, mesh.pipeline_ranks


def test_tensor_parallel_ranks_are_innermost(ranks: RankPool) -> None:
    assert ranks.run(4, _place_in_three_dimensions) == [
        (0, 0, 0, [0, 2]),
        (1, 0, 0, [1, 3]),
        (0, 0, 1, [0, 2]),
        (1, 0, 1, [1, 3]),
    ]


def test_data_parallel_size_follows_from_the_processes() -> None:
    assert data_parallel_size(ParallelConfig(pipeline=2), 8) == 4
    assert data_parallel_size(ParallelConfig(pipeline=2, data=4), 8) == 4


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (ParallelConfig(pipeline=3), 8, "parallel.pipeline: 8 processes don't divide into 3 stages"),
        (ParallelConfig(pipeline=2, data=2), 8, "parallel.data: 2 x 2 stages need 4 processes, not 8"),
    ],
)
def test_processes_that_do_not_fit_are_refused(parallel: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        data_parallel_size(parallel, world_size)


def _train_a_step(schedule: str) -> int:
    before = _count_threads()
    one_step(tiny_config(exits={"layers": [2, 5]}, parallel={"pipeline": 2, "schedule": schedule}))
    assert _count_threads() > before + 10, "gloo has threads for each group"
    return before


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("schedule", ["1f1b", "megatron"])
def test_a_case_leaves_no_threads_to_the_next(ranks: RankPool, schedule: str) -> None:
    """Left alone, those of a thousand cases take more than half of the processors' time."""
    ranks.run(2, _train_a_step, schedule)
    before = ranks.run(2, _count_threads)
    ranks.run(2, _train_a_step, schedule)
    assert ranks.run(2, _count_threads) == before


def test_a_case_that_ends_at_once_leaves_the_others_their_connections(ranks: RankPool) -> None:
    """One in a hundred failed: a rank that is done closed what its peer had not accepted yet."""
    for _ in range(30):
        ranks.run(2, _count_threads)
