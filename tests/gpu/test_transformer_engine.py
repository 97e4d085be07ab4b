"""Transformer Engine's layers compute what megatron-core's do."""

from pathlib import Path

import pytest
from gpu import cases
from gpu.conftest import Place
from gpu.runs import assert_same_first_step, first_step_config
from helpers.runs import write_small_dataset

from megatron_ee.checkpoint.folders import newest_checkpoint

BF16 = {"precision": "bf16", "train_iters": 6, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 0}


@pytest.fixture
def engine(gpu: Place) -> Place:
    """A GPU whose processes can import Transformer Engine."""
    (problem,) = gpu.run(1, cases.engine_problem)
    if problem is not None:
        pytest.skip(problem)
    return gpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_dataset(tmp_path)
    return tmp_path


def test_a_step_equals_that_of_megatron_cores_layers(folder: Path, engine: Place) -> None:
    results = [
        engine.run(1, case, first_step_config(folder, name=name, training=BF16), 1)[0]
        for name, case in (("engine", cases.train_on_engine), ("core", cases.train_on))
    ]
    assert results[0]["parameters"].keys() == results[1]["parameters"].keys()
    assert_same_first_step(results[0]["figures"][1], results[1]["figures"][1], loss=2e-2, norm=5e-2)


def test_checkpoints_go_both_ways(folder: Path, engine: Place, cpu_place: Place) -> None:
    """A machine without Transformer Engine reads what one with it wrote, and the other way round."""
    config = first_step_config(folder, name="crossing", training=BF16)
    (written,) = engine.run(1, cases.train_on_engine, config, 1)
    step = newest_checkpoint(folder / "runs/crossing")
    assert step is not None
    (read,) = cpu_place.run(1, cases.read, step, config)
    assert all((read[name] == value).all() for name, value in written["parameters"].items())
    (on_core,) = engine.run(1, cases.train_and_save, config, 2)
    assert on_core["started_at"] == 1
    (on_engine,) = engine.run(1, cases.train_on_engine, config, 3)
    assert on_engine["started_at"] == 2
