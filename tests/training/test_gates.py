"""Gates in whole runs: the model they are trained beside, their figures, checkpoints, and what they come to."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.checkpoint.folders import CheckpointError, newest_checkpoint
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer
from megatron_ee.training.gate_loss import gate_loss

GATES: dict[str, Any] = {"layers": [2, 5], "gate": ["linear", "mlp"], "weight_schedule": {"warmup_iters": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    write_small_dataset(folder)
    return folder


def test_closed_form_of_a_gates_loss() -> None:
    logits_SB = torch.tensor([[0.0, 2.0, -1.0, 3.0]], requires_grad=True)
    right_SB = torch.tensor([[True, True, False, False]])
    mask_SB = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    sums = gate_loss(logits_SB, right_SB, mask_SB, false_exit_cost=3.0)
    expected = math.log(2) + math.log(1 + math.exp(-2)) + 3 * math.log(1 + math.exp(-1))
    assert float(sums.loss.detach()) == pytest.approx(expected)
    assert float(sums.right) == 3, "0.0 is a yes"
    sigmoids = [1 / (1 + math.exp(-logit)) for logit in (0.0, 2.0, -1.0)]
    assert float(sums.confidence) == pytest.approx(sum(sigmoids))
    torch.autograd.backward(sums.loss)
    gradient = [-0.5, sigmoids[1] - 1, 3 * sigmoids[2], 0.0]
    assert logits_SB.grad is not None
    assert logits_SB.grad.flatten().tolist() == pytest.approx(gradient)


@given(st.floats(0.05, 0.95), st.floats(0.25, 8))
def test_the_best_gate_says_less_than_the_probability_by_the_cost(share: float, cost: float) -> None:
    """Where an exit is right with probability r, no logit is better than log(r / (1 - r)) - log c."""
    best = math.log(share / (1 - share)) - math.log(cost)

    def expected(logit: float) -> float:
        logits_SB, mask_SB = torch.tensor([[logit]], dtype=torch.float64), torch.ones(1, 1)
        right, wrong = (
            float(gate_loss(logits_SB, torch.tensor([[answer]]), mask_SB, false_exit_cost=cost).loss)
            for answer in (True, False)
        )
        return share * right + (1 - share) * wrong

    assert expected(best) < min(expected(best - 0.1), expected(best + 0.1))


@pytest.mark.parametrize("pipeline", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_with_gates_is_the_run_without_bit_for_bit(folder: Path, ranks: RankPool, pipeline: int) -> None:
    """Clipping and all: every figure and every parameter beside the gates' own."""
    results = {}
    for name, exits in (("plain", {key: GATES[key] for key in ("layers", "weight_schedule")}), ("gated", GATES)):
        training = {"train_iters": 3, "eval_iters": 1}
        parallel = {"pipeline": pipeline}
        config = run_config(folder, name=f"{name}-{pipeline}", exits=exits, training=training, parallel=parallel)
        results[name] = ranks.run(pipeline, train, config)
    for plain, gated in zip(results["plain"], results["gated"], strict=True):
        for parameter, value in plain["parameters"].items():
            np.testing.assert_array_equal(gated["parameters"][parameter], value, err_msg=parameter)
        for iteration, figures in plain["figures"].items():
            for figure, value in figures.items():
                if figure.startswith(("train/", "val/")):
                    assert gated["figures"][iteration][figure] == value, figure
            assert figures["train/grad_norm"] > 1.0, "clipped"


def test_figures_of_gates(folder: Path, ranks: RankPool) -> None:
    config = run_config(
        folder, name="figures", exits={**GATES, "gate": ["none", "mlp"]}, training={"train_iters": 12, "eval_iters": 1}
    )
    (result,) = ranks.run(1, train, config)
    first, last = result["figures"][1], result["figures"][12]
    for kind in ("train", "val"):
        figures = {name: last[f"{kind}/exit_5/gate_{name}"] for name in ("loss", "accuracy", "mean")}
        assert 0 < figures["loss"] < first["train/exit_5/gate_loss"], kind
        assert 0 <= figures["accuracy"] <= 1 and 0 < figures["mean"] < 1
        assert not any("exit_2/gate" in name or "exit_8/gate" in name for name in last)


@pytest.mark.parametrize(
    ("saving", "loading"),
    [({}, {"tensor": 2}), pytest.param({"tensor": 2, "sequence": True}, {"pipeline": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_gates_are_saved_and_loaded_in_any_layout(
    folder: Path, ranks: RankPool, saving: dict[str, Any], loading: dict[str, Any]
) -> None:
    name = "-".join([*saving, "to", *loading])
    training = {"train_iters": 4}
    before = run_config(folder, name=f"{name}-same", exits=GATES, training=training, parallel=saving)
    ranks.run(2 if saving else 1, _train_two, before)
    shutil.copytree(folder / f"runs/{name}-same", folder / f"runs/{name}-other", symlinks=True)
    losses = []
    for which, parallel in (("same", saving), ("other", loading)):
        after = run_config(folder, name=f"{name}-{which}", exits=GATES, training=training, parallel=parallel)
        result = ranks.run(2 if parallel else 1, train, after)[0]
        assert result["started_at"] == 2
        losses.append([result["figures"][4][f"train/exit_{layer}/gate_loss"] for layer in (2, 5)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_run_that_goes_on_is_the_run_that_never_stopped(folder: Path, ranks: RankPool) -> None:
    """Bit for bit, with figures over a log interval that the checkpoint lies in."""
    exits = {**GATES, "gate_loss": {"target": "final"}, "token_weights": "max_probability"}
    more: dict[str, Any] = {"exits": exits, "training": {"train_iters": 6}, "logging": {"interval": 3}}
    (whole,) = ranks.run(1, train, run_config(folder, name="whole", **more))
    config = run_config(folder, name="in-two", **more)
    ranks.run(1, _train_two, config)
    (rest,) = ranks.run(1, train, config)
    for iteration in (3, 6):
        for name, value in whole["figures"][iteration].items():
            if name.startswith("train/"):
                assert rest["figures"][iteration][name] == value, name
    for name, value in whole["parameters"].items():
        np.testing.assert_array_equal(rest["parameters"][name], value, err_msg=name)


def test_other_gates_are_another_model_and_an_older_checkpoint_has_none(folder: Path, ranks: RankPool) -> None:
    plain = {key: GATES[key] for key in ("layers", "weight_schedule")}
    config = run_config(folder, name="older", exits=plain, training={"train_iters": 4})
    ranks.run(1, _train_two, config)
    (message,) = ranks.run(1, _refusal, run_config(folder, name="older", exits=GATES, training={"train_iters": 4}))
    assert "exits.gate is none, not ('linear', 'mlp')" in message
    step = newest_checkpoint(folder / "runs" / "older")
    assert step is not None
    content = json.loads((step / "format.json").read_text())
    for name in ("temperature", "gate", "gate_loss", "distillation", "token_weights"):
        del content["exits"][name]  # as it was before these were
    (step / "format.json").write_text(json.dumps(content))
    (result,) = ranks.run(1, train, config)
    assert result["started_at"] == 2


def test_gates_learn_with_the_loss_scale_of_fp16(folder: Path, ranks: RankPool) -> None:
    """One step of theirs at fp16 and a loss scale of 1024 is that of fp32."""
    results = {}
    for precision, scale in (("fp32", 1.0), ("fp16", 1024.0)):
        config = run_config(
            folder,
            name=f"gates-{precision}",
            exits=GATES,
            training={"precision": precision, "train_iters": 1},
            optimizer={"initial_loss_scale": scale, "epsilon": 1e-3},
        )
        (results[precision],) = ranks.run(1, train, config)
    names = [name for name in results["fp32"]["parameters"] if ".gate." in name]
    assert len(names) == 3 + 5
    for name in names:
        half, full = (results[precision]["parameters"][name] for precision in ("fp16", "fp32"))
        np.testing.assert_allclose(half, full, atol=2e-3, err_msg=name)
    moved = results["fp32"]["parameters"]["exits.2.gate.output.bias"]
    assert np.abs(moved).max() > 4e-3, "a step is larger than what half precision hides"


def _train_two(config: Config) -> None:
    train(config, until=2, save=True)


def _refusal(config: Config) -> str:
    try:
        build_trainer(config, choose_device("cpu"))
    except CheckpointError as error:
        return str(error)
    return "nothing was refused"
