"""Training in half precision: close to fp32, with the loss scale of fp16 over every exit."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoding import request, texts_of
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.checkpoint.folders import CheckpointError, newest_checkpoint
from megatron_ee.config import Config, ExitParams
from megatron_ee.device import choose_device
from megatron_ee.inference.loading import load_model
from megatron_ee.training.build import build_trainer
from megatron_ee.training.operations.skipping import DivergedError

Results = list[dict[str, Any]]
LAYOUTS = {"one": {}, "pipeline": {"pipeline": 2}, "tensor": {"tensor": 2, "sequence": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, ranks: RankPool) -> Callable[[str, str], Results]:
    """What each rank has of a whole run in a layout and a precision, which is trained once."""

    @cache
    def train_whole(layout: str, precision: str) -> Results:
        parallel = LAYOUTS[layout]
        world_size = parallel.get("pipeline", 1) * parallel.get("tensor", 1)
        return ranks.run(world_size, train, _config(folder, f"{precision}-{layout}", precision, parallel))

    return train_whole


def _config(folder: Path, name: str, precision: str, parallel: dict[str, Any], **changes: Any) -> Config:
    training = {"precision": precision, "train_iters": 4}
    return run_config(folder, name=name, parallel=parallel, training=training, **changes)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("one", "bf16"),
        pytest.param("one", "fp16", marks=pytest.mark.slow),
        pytest.param("pipeline", "bf16", marks=pytest.mark.slow),
        ("pipeline", "fp16"),
        pytest.param("tensor", "bf16", marks=pytest.mark.slow),
        pytest.param("tensor", "fp16", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_near_those_of_fp32(
    trained: Callable[[str, str], Results], precision: str, layout: str
) -> None:
    figures = trained(layout, precision)[0]["figures"]
    for iteration, expected in trained("one", "fp32")[0]["figures"].items():
        measured = figures[iteration]
        for exit_layer in (2, 5, 8):
            name = f"train/exit_{exit_layer}/loss"
            assert measured[name] == pytest.approx(expected[name], rel=0.02), (iteration, name)
        assert measured["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=0.1)
        assert measured["train/skipped"] == 0
        assert measured["train/loss_scale"] == (65536 if precision == "fp16" else 1)


def test_a_step_that_overflows_is_skipped_and_the_scale_falls(folder: Path, ranks: RankPool) -> None:
    optimizer = {"initial_loss_scale": 2.0**28}
    results = ranks.run(2, train, _config(folder, "overflow", "fp16", {"pipeline": 2}, optimizer=optimizer))
    figures = results[0]["figures"]
    scales = [figures[iteration]["train/loss_scale"] for iteration in sorted(figures)]
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < 2.0**28
    assert figures[1]["train/skipped"] == 1
    assert "train/grad_norm" not in figures[1]
    assert figures[2]["train/exit_8/loss"] == pytest.approx(figures[1]["train/exit_8/loss"], rel=0.1), "no update"


def _train_to_three(config: Config) -> None:
    train(config, until=3, save=True)


def test_a_resumed_run_in_half_precision_is_the_uninterrupted_one(
    folder: Path, ranks: RankPool, trained: Callable[[str, str], Results]
) -> None:
    ranks.run(2, _train_to_three, _config(folder, "stopped", "fp16", {"pipeline": 2}))
    shutil.copytree(folder / "runs/stopped", folder / "runs/again", symlinks=True)
    resumed = ranks.run(2, train, _config(folder, "again", "fp16", {"pipeline": 2}))
    for ours, theirs in zip(resumed, trained("pipeline", "fp16"), strict=True):
        assert ours["started_at"] == 3
        for name, parameter in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)


def _dtypes_in_decoding(config: Config) -> set[str]:
    step = newest_checkpoint(Path(config.runs) / config.name)
    assert step is not None
    model = load_model(step, config, choose_device("cpu"))
    (text,) = texts_of(model, [request([65, 66], ExitParams(threshold=0.5), max_new_tokens=4)])
    assert len(text) == 4
    return {str(parameter.dtype) for parameter in model.stage.parameters()}


def test_a_checkpoint_says_its_precision(folder: Path, ranks: RankPool) -> None:
    ranks.run(1, _train_to_three, _config(folder, "half", "bf16", {}))
    config = _config(folder, "half", "bf16", {})
    assert ranks.run(1, _dtypes_in_decoding, config) == [{"torch.bfloat16"}]
    with pytest.raises(AssertionError, match=r"training\.precision is bf16, not fp32") as caught:
        ranks.run(1, train, _config(folder, "half", "fp32", {}))
    assert CheckpointError.__name__ in str(caught.value)


def _train_without_numbers(config: Config) -> tuple[str, int]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    with torch.no_grad():
        for parameter in trainer.stage.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    return str(caught.value), trainer.skipped.since_record


def test_overflow_at_every_scale_ends_the_run(folder: Path, ranks: RankPool) -> None:
    """First the scale goes down, which is no fault; at 1 it is one."""
    config = _config(
        folder,
        "no-scale",
        "fp16",
        {},
        optimizer={"initial_loss_scale": 4.0},
        faults={"max_nonfinite": 2},
        logging={"interval": 100},
    )
    ((said, num_skipped),) = ranks.run(1, _train_without_numbers, config)
    assert said.startswith("iteration 4: the gradients are no numbers (samples 12 to 15, loss of exit 2: nan")
    assert num_skipped == 4
