"""A run that is stopped and resumed is the run that was never stopped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

MEASURED = ("perf/", "time/", "pipeline/", "memory/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, ranks: RankPool) -> list[dict[str, Any]]:
    return ranks.run(2, train, run_config(folder, name="whole", parallel={"pipeline": 2}))


@pytest.fixture(scope="module")
def stopped(folder: Path, ranks: RankPool) -> Path:
    """The folder of a run with two stages that was stopped after 3 of its 6 iterations."""
    config = run_config(folder, name="stopped", parallel={"pipeline": 2})
    ranks.run(2, _train_and_save_at_three, config)
    return folder / "runs/stopped"


def _train_and_save_at_three(config: Any) -> None:
    train(config, until=3, save=True)


def _copy_run(stopped: Path, name: str) -> None:
    shutil.copytree(stopped, stopped.with_name(name), symlinks=True)


def _losses(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {
        iteration: {name: value for name, value in figures.items() if not name.startswith(MEASURED)}
        for iteration, figures in result["figures"].items()
    }


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]], stopped: Path
) -> None:
    _copy_run(stopped, "same-layout")
    resumed = ranks.run(2, train, run_config(folder, name="same-layout", parallel={"pipeline": 2}))
    assert [result["started_at"] for result in resumed] == [3, 3]
    expected = _losses(uninterrupted[0])
    assert _losses(resumed[0]) == {iteration: expected[iteration] for iteration in (4, 5, 6)}
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        for name, parameter in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)


@pytest.mark.parametrize(
    ("name", "world_size", "parallel"),
    [
        ("one-process", 1, {}),
        ("two-replicas", 2, {"pipeline": 1}),
        ("four-stages", 4, {"pipeline": 4}),
        pytest.param("tensor", 2, {"pipeline": 1, "tensor": 2}, marks=pytest.mark.slow),
        (
            "sequence-and-chunks",
            4,
            {"pipeline": 2, "tensor": 2, "sequence": True, "chunks": 2, "schedule": "interleaved"},
        ),
        ("unequal", 2, {"pipeline": 2, "layout": [{"layers": 2}, {"layers": 6}]}),
    ],
)
def test_another_layout_goes_on_within_rounding(
    folder: Path,
    ranks: RankPool,
    uninterrupted: list[dict[str, Any]],
    stopped: Path,
    name: str,
    world_size: int,
    parallel: dict[str, Any],
) -> None:
    _copy_run(stopped, name)
    resumed = ranks.run(world_size, train, run_config(folder, name=name, parallel=parallel))
    expected = _losses(uninterrupted[0])
    for iteration in (4, 5, 6):
        for figure, value in _losses(resumed[0])[iteration].items():
            assert value == pytest.approx(expected[iteration][figure], rel=1e-4, abs=1e-5), (iteration, figure)


def test_tensor_parallel_ranks_save_what_one_process_reads(
    folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]]
) -> None:
    split = {"pipeline": 2, "tensor": 2, "chunks": 2, "schedule": "interleaved"}
    ranks.run(4, _train_and_save_at_three, run_config(folder, name="split", parallel=split))
    resumed = ranks.run(1, train, run_config(folder, name="split", parallel={}))
    assert resumed[0]["started_at"] == 3
    expected = _losses(uninterrupted[0])
    for name, value in _losses(resumed[0])[6].items():
        assert value == pytest.approx(expected[6][name], rel=1e-4, abs=1e-5), name


def test_training_learns(uninterrupted: list[dict[str, Any]]) -> None:
    losses = [uninterrupted[0]["figures"][iteration]["train/exit_8/loss"] for iteration in range(1, 7)]
    assert losses[-1] < losses[0] - 0.3


def test_weights_warm_up_in_the_record(uninterrupted: list[dict[str, Any]]) -> None:
    weights = [uninterrupted[0]["figures"][iteration]["train/exit_2/weight"] for iteration in range(1, 7)]
    assert weights == pytest.approx([0, 0.0625, 0.125, 0.1875, 0.25, 0.25])
