"""A checkpoint of any layout, and of a plain or a distributed optimizer, goes on in any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from helpers.tiny import RandomSamples
from megatron.core import dist_checkpointing

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.model.stage import Tap
from megatron_ee.parallel.pipeline.plan import Action
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.training.build import build_trainer
from megatron_ee.training.planning import plan_validation
from megatron_ee.training.trainer import Trainer

MEASURED = ("perf/", "time/", "pipeline/", "memory/")
DISTRIBUTED = {"overlap_grad_reduce": True, "distributed_optimizer": True}
HEADS = {"layers": [2, 4, 6], "head": ["mlp", "block", "norm"], "projection": ["shared", "own", "shared"]}
TODAYS = {"qkv_bias": True, "qk_norm": True, "sliding_window": 5, "sliding_window_layers": [2, 4, 7]}
TIED = {
    "tied": {"model": {"vocab_size": "auto", "tie_embeddings": True}},
    "untied": {"model": {"vocab_size": "auto", **TODAYS}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding")
    write_small_dataset(folder)
    return folder


def _losses(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {
        iteration: {name: value for name, value in figures.items() if not name.startswith(MEASURED)}
        for iteration, figures in result["figures"].items()
    }


def _assert_same_course(resumed: dict[str, Any], expected: dict[str, Any], iterations: range) -> None:
    ours, theirs = _losses(resumed), _losses(expected)
    assert list(ours) == list(iterations)
    for iteration in iterations:
        for name, value in ours[iteration].items():
            assert value == pytest.approx(theirs[iteration][name], rel=1e-4, abs=1e-5), (iteration, name)


def _stop_at_three(config: Config) -> None:
    train(config, until=3, save=True)


@pytest.mark.slow
@pytest.mark.parametrize("tied", TIED)
def test_exits_of_every_kind_go_from_tp2_x_pp2_to_one_process(folder: Path, ranks: RankPool, tied: str) -> None:
    name, fields = f"heads-{tied}", {"exits": HEADS, "training": {"train_iters": 8}, **TIED[tied]}
    split = run_config(folder, name=name, parallel={"tensor": 2, "pipeline": 2}, **fields)
    saved = ranks.run(4, _train_three_and_show_logits, split)
    (opened,) = ranks.run(1, _show_logits, run_config(folder, name=name, parallel={}, **fields))
    expected = {layer: logits for shown in saved for layer, logits in shown.items()}
    assert opened.keys() == expected.keys() == {2, 4, 6, 8}
    for layer, logits in opened.items():
        np.testing.assert_allclose(logits, expected[layer], atol=1e-5, rtol=0, err_msg=f"exit {layer}")
    names = _names_on_disk(folder / "runs" / name)
    assert ("output.weight" in names) == (tied == "untied"), "saved once"
    for vector in ("linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight"):
        owners = ("layers.3", "exits.4.block")
        present = [f"{owner}.self_attention.{vector}" in names for owner in owners]
        assert present == [tied == "untied"] * 2, vector
    (resumed,) = ranks.run(1, train, run_config(folder, name=name, parallel={}, **fields))
    whole = ranks.run(
        4, train, run_config(folder, name=f"{name}-whole", parallel={"tensor": 2, "pipeline": 2}, **fields)
    )
    _assert_same_course(resumed, whole[0], range(4, 9))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_distributed_optimizer_resumes_bit_for_bit(folder: Path, ranks: RankPool, precision: str) -> None:
    def config(name: str) -> Config:
        training = {"precision": precision}
        return run_config(
            folder, name=f"{name}-{precision}", parallel={"pipeline": 2, **DISTRIBUTED}, training=training
        )

    uninterrupted = ranks.run(4, train, config("uninterrupted"))
    ranks.run(4, _stop_at_three, config("stopped"))
    resumed = ranks.run(4, train, config("stopped"))
    expected = _losses(uninterrupted[0])
    assert _losses(resumed[0]) == {iteration: expected[iteration] for iteration in (4, 5, 6)}
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        for name, parameter in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((4, {"pipeline": 2, **DISTRIBUTED}), (1, {}), marks=pytest.mark.slow),
        pytest.param((4, {"pipeline": 2, **DISTRIBUTED}), (2, {"tensor": 2}), marks=pytest.mark.slow),
        pytest.param((2, {"pipeline": 2}), (2, {"distributed_optimizer": True}), marks=pytest.mark.slow),
        pytest.param(
            (2, {"distributed_optimizer": True}),
            (4, {"tensor": 2, "sequence": True, "distributed_optimizer": True}),
            marks=pytest.mark.slow,
        ),
        ((4, {"pipeline": 2, "chunks": 2, "schedule": "interleaved", **DISTRIBUTED}), (2, {"pipeline": 2})),
    ],
    ids=lambda layout: "-".join([str(layout[0]), *layout[1]]),
)
def test_optimizers_exchange_their_state(
    folder: Path,
    ranks: RankPool,
    request: pytest.FixtureRequest,
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
) -> None:
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    ranks.run(first[0], _stop_at_three, run_config(folder, name=name, parallel=first[1]))
    resumed = ranks.run(second[0], train, run_config(folder, name=name, parallel=second[1]))
    whole = ranks.run(1, train, run_config(folder, name=f"{name}-whole", parallel={}))
    _assert_same_course(resumed[0], whole[0], range(4, 7))


def test_a_resumed_distributed_optimizer_counts_a_step_once(folder: Path, ranks: RankPool) -> None:
    """megatron-core lets all parameters share one tensor `step` then, which each of them increments."""
    config = run_config(folder, name="steps", parallel=DISTRIBUTED)
    ranks.run(2, _stop_at_three, config)
    for steps in ranks.run(2, _steps_after_one_more, config):
        assert steps
        assert set(steps) == {4.0}


def _steps_after_one_more(config: Config) -> list[float]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    trainer.train_step(trainer.loader.batch(trainer.progress.consumed_samples), trainer.progress.iteration)
    (inner,) = trainer.optimizer._optimizer.chained_optimizers  # type: ignore[attr-defined]
    return [float(state["step"]) for state in inner.optimizer.state.values()]


def _train_three_and_show_logits(config: Config) -> dict[int, np.ndarray]:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = []
    trainer.train(3)
    trainer.save()
    return _logits(trainer)


def _names_on_disk(run: Path) -> set[str]:
    step = newest_checkpoint(run)
    assert step is not None
    return set(dist_checkpointing.load_tensors_metadata(str(step)))


def _show_logits(config: Config) -> dict[int, np.ndarray]:
    return _logits(build_trainer(config, choose_device("cpu")))


def _logits(trainer: Trainer) -> dict[int, np.ndarray]:
    """[S, V] at each of this rank's exits, for the same tokens everywhere."""
    tokens_BS = RandomSamples()[0]["tokens"].repeat(2)[None, :16]
    program = _Logits(trainer, tokens_BS)
    runtime = Runtime(trainer.mesh, trainer.runtime._message)
    runtime.run(plan_validation(_layout(trainer), 1), program)
    return program.logits


def _layout(trainer: Trainer) -> Any:
    gathered: list[Any] = [None] * trainer.mesh.world_size
    dist.all_gather_object(gathered, trainer.stage.chunks)
    return tuple(gathered[rank] for rank in trainer.mesh.pipeline_ranks)


class _Logits:
    """A program that shows every exit's logits over the whole vocabulary."""

    def __init__(self, trainer: Trainer, tokens_BS: torch.Tensor) -> None:
        self.stage, self.tokens_BS = trainer.stage.eval(), tokens_BS
        self.positions = torch.arange(tokens_BS.shape[1])
        self.taps: dict[Tap, torch.Tensor] = {}
        self.logits: dict[int, np.ndarray] = {}

    @torch.no_grad()
    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        x_SBH = self.stage.embed(self.tokens_BS) if received is None else received
        chunk = self.stage.chunks[action.chunk]
        y_SBH, self.taps = self.stage.run_layers(x_SBH, self.positions, chunk.start, chunk.stop)
        return y_SBH

    @torch.no_grad()
    def exits(self, action: Action) -> None:
        for tap, hidden_SBH in self.taps.items():
            own = self.stage.exit_logits(hidden_SBH, tap.layer, self.positions).contiguous()
            parts = [torch.empty_like(own) for _ in range(self.stage.tp_group.size())]
            dist.all_gather(parts, own, group=self.stage.tp_group)
            self.logits[tap.layer] = torch.cat(parts, -1).squeeze(1).numpy()

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        raise AssertionError("nothing is trained")
