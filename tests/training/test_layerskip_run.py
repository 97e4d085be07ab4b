"""Whole runs by LayerSkip's recipe: resume, evaluation, the record, the checkpoint, and decoding from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.checkpoint.folders import CheckpointError
from megatron_ee.checkpoint.sharded import check_same_model
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

MEASURED = ("perf/", "time/", "pipeline/", "memory/")


def _config(folder: Path, **changes: Any) -> Config:
    training = {"train_iters": 8, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 0}
    dropout = {"maximum": 0.5, "shape": "linear", "curriculum": "exponential"}
    exits = {"layers": "all", "norm": "shared", "layerskip": {"curriculum": "rotational", "rotation": 3}}
    return run_config(
        folder,
        name=changes.pop("name", "run"),
        exits={**exits, **changes.pop("exits", {}), "weight_schedule": {}},
        training={**training, "layer_dropout": dropout, **changes.pop("training", {})},
        **{"logging": {"interval": 3}, "parallel": {"pipeline": 2}, **changes},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layerskip")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, ranks: RankPool) -> list[dict[str, Any]]:
    return ranks.run(2, train, _config(folder, name="whole"))


def _stop_at_four(config: Config) -> None:
    train(config, until=4, save=True)


def _figures(result: dict[str, Any], iteration: int) -> dict[str, float]:
    return {name: value for name, value in result["figures"][iteration].items() if not name.startswith(MEASURED)}


@pytest.mark.parametrize(("name", "parallel"), [("same", {"pipeline": 2}), ("alone", {"pipeline": 1})])
def test_a_run_goes_on_in_the_middle_of_a_rotation_and_of_an_interval(
    folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]], name: str, parallel: dict[str, int]
) -> None:
    """torchtune's version forgets the curriculum on resume. Stopped after 4 of 8 iterations, where the meter holds the
    fourth's losses of some exits. Bit for bit on the same ranks; on others within rounding."""
    ranks.run(2, _stop_at_four, _config(folder, name=name))
    resumed = ranks.run(parallel["pipeline"], train, _config(folder, name=name, parallel=parallel))
    is_same = parallel["pipeline"] == 2
    assert resumed[0]["started_at"] == 4
    for iteration in (6, 8):
        expected = _figures(uninterrupted[0], iteration)
        figures = _figures(resumed[0], iteration)
        assert figures == (expected if is_same else pytest.approx(expected, rel=1e-4, abs=1e-5))
    if is_same:
        for ours, theirs in zip(resumed, uninterrupted, strict=True):
            for parameter, value in theirs["parameters"].items():
                np.testing.assert_array_equal(ours["parameters"][parameter], value, err_msg=parameter)


def test_the_record(uninterrupted: list[dict[str, Any]]) -> None:
    figures = _figures(uninterrupted[0], 6)
    # the sixth iteration is t = 5: l = 2, 5 and the last have a loss; e(l) is 0.2 x 3, 0.2 x 15, and 7 + 0.2 x 21
    weights = [figures[f"train/exit_{exit_}/weight"] for exit_ in range(1, 9)]
    total = 0.6 + 3.0 + 11.2
    assert weights == pytest.approx([0, 0, 0.6 / total, 0, 0, 3.0 / total, 0, 11.2 / total])
    growth = (2 ** (5 / 7) - 1) * 0.5
    dropout = [figures[f"train/layer_{layer}/dropout"] for layer in range(1, 9)]
    assert dropout == pytest.approx([growth * layer / 7 for layer in range(8)])
    measured = [exit_ for exit_ in range(1, 9) if f"train/exit_{exit_}/loss" in figures]
    assert measured == [2, 3, 4, 5, 6, 7, 8], "each had its turn in three iterations, but for the first: e(0) = 0"
    assert figures["train/loss"] == pytest.approx(
        sum(weights[exit_ - 1] * figures[f"train/exit_{exit_}/loss"] for exit_ in measured)
    )


def _watch(config: Config) -> dict[str, Any]:
    """What a run's layers see in its iterations and in validation, and whether the last layer learns in each."""
    trainer = build_trainer(config, choose_device("cpu"))
    stage, rows, heads = trainer.stage, [0] * 9, 0
    for layer, module in stage.layers.items():

        def count(_: Any, inputs: tuple[torch.Tensor], layer: int = int(layer)) -> None:
            rows[layer] += inputs[0].shape[1]

        module.register_forward_pre_hook(count)

    def count_heads(*_: Any) -> None:
        nonlocal heads
        heads += 1

    assert stage.norm is not None
    stage.norm.register_forward_pre_hook(count_heads)
    steps = []
    for iteration in range(config.training.train_iters):
        rows[:], heads = [0] * 9, 0
        before = [parameter.detach().clone() for parameter in stage.layers["8"].parameters()]
        expected = trainer._kept(iteration)
        trainer.train(until=iteration + 1)
        size = config.training.micro_batch_size
        steps.append(
            {
                "rows": list(rows[1:]),
                "expected": [
                    sum(len(kept[layer]) if layer in kept else size for kept in expected) for layer in range(1, 9)
                ],
                "heads": heads,
                "learns": all(
                    not torch.equal(old, new) for old, new in zip(before, stage.layers["8"].parameters(), strict=True)
                ),
            }
        )
    rows[:], heads = [0] * 9, 0
    assert trainer.evaluator is not None
    figures = trainer.evaluator.evaluate(trainer._weights(7))
    return {"steps": steps, "validation": {"rows": list(rows[1:]), "heads": heads, "figures": figures}}


@pytest.mark.parametrize(
    "curriculum", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "rotational")), "gradual"]
)
def test_work_is_saved_the_last_layer_learns_and_validation_runs_everything(
    folder: Path, ranks: RankPool, curriculum: str
) -> None:
    config = _config(
        folder,
        name=f"watched-{curriculum}",
        parallel={},
        exits={"layerskip": {"curriculum": curriculum}},
        training={"eval_iters": 1, "eval_interval": 0, "layer_dropout": {"maximum": 0.5, "shape": "linear"}},
    )
    (seen,) = ranks.run(1, _watch, config)
    steps = seen["steps"][:-1]  # the last step is followed by a validation
    assert all(step["rows"] == step["expected"] for step in steps)
    assert [sum(step["rows"][0] for step in steps), sum(step["rows"][7] for step in steps) < 0.8 * 28] == [28, True]
    assert all(step["learns"] for step in seen["steps"])
    # of two micro-batches; e(0) = 0; rotation 8 of 8 layers; T / (2 L) = 1/2: two more layers in each iteration
    heads = {"none": [7] * 7, "rotational": [1, *[2] * 6], "gradual": [1, 3, 5, 7, 7, 7, 7]}[curriculum]
    assert [step["heads"] / 2 for step in steps] == heads
    assert seen["validation"]["rows"] == [4] * 8
    assert seen["validation"]["heads"] == 8 * 2
    assert all(f"val/exit_{exit_}/loss" in seen["validation"]["figures"] for exit_ in range(1, 9))


def test_a_shared_norm_is_saved_once_and_decodes(
    folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]]
) -> None:
    step = folder / "runs/whole/checkpoints/step_00000008"
    assert json.loads((step / "format.json").read_text())["exits"]["norm"] == "shared"
    config = _config(folder, name="whole", parallel={})
    norm, logits = ranks.run(1, _load_and_decode, config)[0]
    for result in uninterrupted:  # the stages' copies
        np.testing.assert_array_equal(result["parameters"]["norm.weight"], norm)
    assert (norm != 1).any()
    assert np.isfinite(logits).all()


def _load_and_decode(config: Config) -> tuple[np.ndarray, np.ndarray]:
    trainer = build_trainer(config, choose_device("cpu"))
    assert trainer.progress.iteration == 8
    stage = trainer.stage.eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        positions = torch.arange(6)
        _, taps = stage.run_layers(stage.embed(tokens), positions, 0, 8)
        logits = [stage.exit_logits(hidden, tap.layer, positions) for tap, hidden in taps.items()]
    keys = [entry.key for entry in stage.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()]
    assert [key for key in keys if "norm" in key and "layers." not in key] == ["norm.weight"]
    assert stage.norm is not None
    return stage.norm.weight.detach().numpy().copy(), torch.stack(logits).numpy()


def _description_with_own_norms(config: Config) -> str:
    trainer = build_trainer(config.model_copy(update={"name": "other"}), choose_device("cpu"))
    step = Path(config.runs) / "whole/checkpoints/step_00000008"
    try:
        check_same_model(step, trainer.description)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_checkpoint_with_another_norm_is_refused(
    folder: Path, ranks: RankPool, uninterrupted: list[dict[str, Any]]
) -> None:
    config = _config(folder, name="whole", parallel={}, exits={"norm": "own"})
    (said,) = ranks.run(1, _description_with_own_norms, config)
    assert "exits.norm is shared, not own" in said
