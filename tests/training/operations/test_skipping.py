"""Steps without numbers: one is left out as if it had not been, several in a row end the run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import RankPool
from helpers.runs import Records, run_config, write_small_dataset

from megatron_ee.checkpoint.folders import whole_checkpoints
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer
from megatron_ee.training.operations.skipping import DivergedError
from megatron_ee.training.trainer import Trainer

LAYOUTS = {
    "one": {},
    "pipeline": {"pipeline": 2},
    "data": {"data": 2},
    "shared-state": {"data": 2, "distributed_optimizer": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    write_small_dataset(folder)
    return folder


def _spoil(trainer: Trainer, iterations: Sequence[int]) -> None:
    """In these iterations (counted from 0) the last rank computes no numbers, and the others do not know."""
    step = trainer.train_step

    def train_step(batch: Any, iteration: int, **options: Any) -> float | None:
        if iteration not in iterations or trainer.mesh.rank != trainer.mesh.world_size - 1:
            return step(batch, iteration, **options)
        layer = next(module for name, module in trainer.stage.named_modules() if name.endswith("mlp"))
        hook = layer.register_forward_hook(lambda module, inputs, output: (output[0] * float("nan"), *output[1:]))
        try:
            return step(batch, iteration, **options)
        finally:
            hook.remove()

    trainer.train_step = train_step  # type: ignore[method-assign]


def _leave_out(trainer: Trainer, iterations: Sequence[int]) -> None:
    """What a skipped step has to come to: no update."""
    step, update = trainer.train_step, trainer.optimizer.step

    def train_step(batch: Any, iteration: int, **options: Any) -> float | None:
        trainer.optimizer.step = (lambda _: 0.0) if iteration in iterations else update  # type: ignore[method-assign]
        return step(batch, iteration, **options)

    trainer.train_step = train_step  # type: ignore[method-assign]


def _train(config: Config, iterations: Sequence[int], spoil: bool) -> dict[str, Any]:
    trainer, records = build_trainer(config, choose_device("cpu")), Records()
    trainer.loggers = [records] if trainer.mesh.is_main else []
    (_spoil if spoil else _leave_out)(trainer, iterations)
    said = ""
    try:
        trainer.train()
    except DivergedError as error:
        said = str(error)
    hashes = {
        iteration: hashlib.sha256(trainer.loader.batch(4 * iteration).tokens_MBS.numpy().tobytes()).hexdigest()
        for iteration in iterations
    }
    parameters = {name: parameter.detach().numpy().copy() for name, parameter in trainer.stage.named_parameters()}
    return {"said": said, "figures": records.figures, "parameters": parameters, "hashes": hashes}


def _config(folder: Path, name: str, layout: str, **changes: Any) -> Config:
    return run_config(folder, name=name, parallel=LAYOUTS[layout], logging={"interval": 2}, **changes)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name == "pipeline" else []) for name in LAYOUTS]
)
def test_a_step_without_numbers_is_as_if_it_had_not_been(folder: Path, ranks: RankPool, layout: str) -> None:
    world_size = 1 if layout == "one" else 2
    spoilt = ranks.run(world_size, _train, _config(folder, f"spoilt-{layout}", layout), [3], True)
    expected = ranks.run(world_size, _train, _config(folder, f"left-out-{layout}", layout), [3], False)
    for ours, theirs in zip(spoilt, expected, strict=True):
        assert ours["said"] == ""
        for name, parameter in theirs["parameters"].items():
            assert np.isfinite(parameter).all()
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)
    figures = spoilt[0]["figures"]
    assert [figures[iteration]["train/skipped"] for iteration in (2, 4, 6)] == [0, 1, 0]
    assert "train/grad_norm" not in figures[4]
    assert np.isfinite(figures[4]["train/loss"]), "the mean of the steps that were"
    assert figures[4]["train/unmasked_tokens"] == figures[2]["train/unmasked_tokens"] / 2
    (line,) = (folder / f"runs/spoilt-{layout}/attempts/1/nonfinite.jsonl").read_text().splitlines()
    identity = json.loads(line)
    assert (identity["iteration"], identity["samples"]) == (4, [12, 16])
    by_data_rank = [result["hashes"][3] for result in spoilt] if "data" in LAYOUTS[layout] else [spoilt[0]["hashes"][3]]
    assert identity["sha256_of_data_ranks_tokens"] == by_data_rank
    assert identity["losses"]["8"] == "nan"


@pytest.mark.slow
def test_several_in_a_row_end_the_run_and_none_of_them_is_saved(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "diverged", "pipeline", checkpoint={"interval": 1}, faults={"max_nonfinite": 2})
    for result in ranks.run(2, _train, config, [1, 3, 4], True):
        assert result["said"].startswith("iteration 5: the gradients are no numbers (samples 16 to 19, loss of exit 2:")
        assert "as in 2 steps in a row (faults.max_nonfinite)" in result["said"]
    assert sorted(whole_checkpoints(folder / "runs/diverged")) == [1, 3]


def test_an_interval_of_nothing_but_skipped_steps_has_no_loss(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "nothing", "one")
    figures = ranks.run(1, _train, config, [2, 3], True)[0]["figures"]
    assert "train/loss" not in figures[4]
    assert (figures[4]["train/unmasked_tokens"], figures[4]["train/skipped"]) == (0, 2)
    assert figures[6]["train/loss"] > 0


def _in_a_row(config: Config, until: int) -> list[int]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    loaded = trainer.skipped.in_a_row
    _spoil(trainer, [1, 2, 3, 4, 5])
    trainer.train(until)
    trainer.save()
    return [loaded, trainer.skipped.in_a_row]


def test_a_resumed_run_goes_on_counting(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "counting", "one", faults={"max_nonfinite": 4})
    assert ranks.run(1, _in_a_row, config, 3) == [[0, 2]]
    assert ranks.run(1, _in_a_row, config, 4) == [[2, 3]]
    with pytest.raises(AssertionError, match="4 steps in a row"):
        ranks.run(1, _in_a_row, config, 6)
