"""Runs that train exits alone on a finished model, and what becomes of it: EE-Tuning from end to end."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import request, texts_of
from helpers.ranks import RankPool
from helpers.runs import Records, refusal, run_config, train, write_small_dataset
from megatron.core import dist_checkpointing

from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.checkpoint.merge import merge_exits
from megatron_ee.checkpoint.unpickling import check_pickles
from megatron_ee.config import Config, load_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import load_model
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.build import build_trainer
from megatron_ee.training.observation.trace import read_trace

MEASURED = ("perf/", "time/", "pipeline/", "memory/")
EXITS = {"layers": [2, 5], "head": ["norm", "mlp"], "projection": ["shared", "own"]}
CONSTANT = {"weight_schedule": {"shape": "constant"}}
ITERS = 12
MERGE = Path(__file__).parents[2] / "tools/merge_exits.py"
IDLE = {"pipeline": 2, "layout": [{"layers": 5}, {"layers": 0}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool, mesh: Mesh) -> Path:
    """With a dataset and a model without exits, trained by two stages: runs/base."""
    folder = tmp_path_factory.mktemp("tuning")
    write_small_dataset(folder)
    training = {"train_iters": 20}
    ranks.run(
        2, train, run_config(folder, name="base", exits={"layers": []}, parallel={"pipeline": 2}, training=training)
    )
    return folder


def tune_config(folder: Path, name: str, *, initial: str = "base", exits: Any = EXITS, **changes: Any) -> Config:
    training = {"trains": "exits", "train_iters": ITERS, "eval_iters": 1, **changes.pop("training", {})}
    checkpoint = {"initial": str(folder / "runs" / initial)}
    return run_config(
        folder,
        name=name,
        exits={**exits, **CONSTANT},
        training=training,
        checkpoint=checkpoint,
        optimizer={"lr": 3e-2, "weight_decay": 0.0},
        **changes,
    )


@pytest.fixture(scope="module")
def tuned(folder: Path, ranks: RankPool) -> dict[str, Any]:
    """What runs/tuned has come to, in two stages."""
    return ranks.run(2, train, tune_config(folder, "tuned", parallel={"pipeline": 2}))[0]


@pytest.fixture(scope="module")
def merged(folder: Path, tuned: dict[str, Any]) -> Path:
    """runs/merged, by the tool."""
    command = [sys.executable, MERGE, folder / "runs/tuned", folder / "runs/merged"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "exits 2, 5" in done.stdout
    return folder / "runs/merged"


def _merge(tuned: Path, destination: Path, initial: Path | None = None) -> str:
    """What it was refused for."""
    try:
        merge_exits(tuned, destination, choose_device("cpu"), initial=initial)
    except UserError as error:
        return str(error)
    return ""


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything in a run's newest checkpoint, by its name on disk."""
    folder = newest_checkpoint(run)
    assert folder is not None
    check_pickles(folder)
    content = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _parameters(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in _tensors(run).items() if not name.startswith("optimizer.")}


def _losses(result: dict[str, Any]) -> dict[int, dict[str, float]]:
    return {
        iteration: {name: value for name, value in figures.items() if not name.startswith(MEASURED)}
        for iteration, figures in result["figures"].items()
    }


def _assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def test_exits_learn_and_the_record_has_no_final_exit(folder: Path, ranks: RankPool, tuned: dict[str, Any]) -> None:
    figures = tuned["figures"]
    (before,) = ranks.run(1, _measure, tune_config(folder, "before"))
    for layer in (2, 5):
        name = f"val/exit_{layer}/loss"
        assert figures[ITERS][name] < before[name] - 0.1, name
    assert not [name for of_step in figures.values() for name in of_step if "exit_8" in name]
    weighted = sum(figures[3][f"train/exit_{layer}/{what}"] for layer in (2, 5) for what in ("weight",))
    assert weighted == pytest.approx(2 / 8 + 5 / 8)


def test_a_checkpoint_of_exits_holds_them_alone(folder: Path, tuned: dict[str, Any]) -> None:
    names = _tensors(folder / "runs/tuned").keys()
    parameters = {name for name in names if name.startswith("exits.")}
    kinds = ("exp_avg", "exp_avg_sq")
    assert names == parameters | {f"optimizer.state.{kind}.{name}" for kind in kinds for name in parameters}
    step = newest_checkpoint(folder / "runs/tuned")
    base = newest_checkpoint(folder / "runs/base")
    assert step is not None and base is not None
    described = read_description(step)
    assert described.initial is not None
    assert (described.trains, described.initial.hash) == ("exits", read_description(base).hash)


@pytest.mark.parametrize(
    ("name", "world_size", "parallel"),
    [
        ("one", 1, {}),
        pytest.param("idle", 2, IDLE, marks=pytest.mark.slow),
        pytest.param(
            *("shared", 4, {"pipeline": 2, "overlap_grad_reduce": True, "distributed_optimizer": True}),
            marks=pytest.mark.slow,
        ),
        ("split", 4, {"pipeline": 2, "tensor": 2, "sequence": True}),
    ],
)
def test_every_layout_goes_the_same_course(
    folder: Path, ranks: RankPool, tuned: dict[str, Any], name: str, world_size: int, parallel: dict[str, Any]
) -> None:
    (result, *_) = ranks.run(world_size, train, tune_config(folder, name, parallel=parallel))
    expected = _losses(tuned)
    for iteration, figures in _losses(result).items():
        for figure, value in figures.items():
            assert value == pytest.approx(expected[iteration][figure], rel=1e-4, abs=1e-5), (iteration, figure)
    ours, theirs = (_parameters(folder / "runs" / run) for run in (name, "tuned"))
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        torch.testing.assert_close(ours[tensor], value, atol=1e-4, rtol=0)


def _stop_at_five(config: Config) -> None:
    train(config, until=5, save=True)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    folder: Path, ranks: RankPool, tuned: dict[str, Any]
) -> None:
    config = tune_config(folder, "stopped", parallel={"pipeline": 2})
    ranks.run(2, _stop_at_five, config)
    shutil.copytree(folder / "runs/stopped", folder / "runs/moved", symlinks=True)
    (resumed, _) = ranks.run(2, train, config)
    expected = _losses(tuned)
    assert resumed["started_at"] == 5
    assert _losses(resumed) == {iteration: expected[iteration] for iteration in range(6, ITERS + 1)}
    _assert_equal(_tensors(folder / "runs/stopped"), _tensors(folder / "runs/tuned"))
    for world_size, parallel in ((1, {}), (2, IDLE)):
        (elsewhere, *_) = ranks.run(world_size, train, tune_config(folder, "moved", parallel=parallel))
        for iteration, figures in _losses(elsewhere).items():
            for name, value in figures.items():
                assert value == pytest.approx(expected[iteration][name], rel=1e-4, abs=1e-5), (iteration, name)
        shutil.rmtree(folder / f"runs/moved/checkpoints/step_{ITERS:08d}")


def test_merging_leaves_the_model_as_it_is_bit_for_bit(folder: Path, merged: Path) -> None:
    ours, base = _parameters(merged), _parameters(folder / "runs/base")
    tuned = _parameters(folder / "runs/tuned")
    assert ours.keys() == base.keys() | tuned.keys() == _tensors(merged).keys()
    _assert_equal(ours, base)
    _assert_equal(ours, tuned)
    assert load_config(merged / "config.yaml").exits.layers == (2, 5)
    assert not [path for path in merged.parent.iterdir() if path.name.startswith(".")]


def _decode(run: Path, layer: int | None) -> list[tuple[int, int]]:
    """Tokens and their layers: of an exit that always fires, or of the whole model."""
    step = newest_checkpoint(run)
    assert step is not None
    config = load_config(step / "config.yaml")
    model = load_model(step, config, choose_device("cpu"))
    changes = {"mode": "full"} if layer is None else {"threshold": 0.0, "exits": (layer,)}
    params = config.inference.exit.model_copy(update=changes)
    (text,) = texts_of(model, [request(model.tokenizer.encode("early exits"), params, max_new_tokens=8)])
    return [(emission.token, emission.exit_layer) for emission in text]


def test_a_merged_model_decodes_at_its_exits_and_as_before_at_full_depth(
    folder: Path, merged: Path, ranks: RankPool
) -> None:
    (full,) = ranks.run(1, _decode, merged, None)
    assert full == ranks.run(1, _decode, folder / "runs/base", None)[0]
    assert {layer for _, layer in full} == {8}
    for exit_layer in (2, 5):
        (emissions,) = ranks.run(1, _decode, merged, exit_layer)
        assert {layer for _, layer in emissions} == {exit_layer}


def _measure(config: Config) -> dict[str, float]:
    """Validation of what a run begins with."""
    trainer = build_trainer(config, choose_device("cpu"))
    assert trainer.evaluator is not None
    return trainer.evaluator.evaluate(trainer._weights(0))


def test_a_merged_model_is_what_a_run_of_all_parameters_begins_with(
    folder: Path, merged: Path, ranks: RankPool, tuned: dict[str, Any]
) -> None:
    config = run_config(
        folder,
        name="further",
        exits={**EXITS, **CONSTANT},
        parallel={"pipeline": 2},
        training={"eval_iters": 1},
        checkpoint={"initial": str(merged)},
    )
    (figures, _) = ranks.run(2, _measure, config)
    for layer in (2, 5):
        name = f"val/exit_{layer}/loss"
        assert figures[name] == pytest.approx(tuned["figures"][ITERS][name], abs=1e-5)
    assert figures["val/exit_8/loss"] < 3.0, "the final exit is the base's"


def test_what_cannot_go_on_says_so(folder: Path, merged: Path, ranks: RankPool) -> None:
    (message,) = ranks.run(1, refusal, run_config(folder, name="merged", exits={**EXITS, **CONSTANT}))
    assert "holds parameters alone" in message
    assert "checkpoint.initial" in message
    whole = run_config(folder, name="tuned", exits={**EXITS, **CONSTANT})
    assert "training.trains is exits, not all" in ranks.run(1, refusal, whole)[0]
    on_exits = tune_config(folder, "on-exits", initial="tuned")
    assert "tools/merge_exits.py makes a model of it" in ranks.run(1, refusal, on_exits)[0]
    other_head = tune_config(folder, "other-head", initial="merged", exits={"layers": [2], "head": "mlp"})
    (message,) = ranks.run(1, refusal, other_head)
    assert "an exit 2 (norm head, own norm, shared projection, gate: none), and another (mlp head," in message


def test_a_run_that_has_begun_with_another_model_is_not_resumed(folder: Path, ranks: RankPool) -> None:
    config = tune_config(folder, "faithful", training={"train_iters": 6})
    ranks.run(1, _stop_at_five, config)
    ranks.run(1, train, run_config(folder, name="other", exits={"layers": []}, training={"train_iters": 1}))
    other = tune_config(folder, "faithful", initial="other", training={"train_iters": 6})
    (message,) = ranks.run(1, refusal, other)
    assert message.startswith("checkpoint.initial: ")
    assert "is not what the run began with" in message
    runs = folder / "runs"
    (message,) = ranks.run(1, _merge, runs / "faithful", runs / "unfaithful", runs / "other")
    assert "is not what the run began with" in message
    assert not (runs / "unfaithful").exists()


def test_exits_that_are_added_later_leave_trained_ones_alone(folder: Path, ranks: RankPool) -> None:
    """EE-LLM's conversion overwrites them. Exit 3 first, then exit 6 on the merged model."""
    for initial, layer in (("base", 3), ("with-3", 6)):
        exits = {"layers": [layer], "head": "mlp"}
        ranks.run(1, train, tune_config(folder, f"tune-{layer}", initial=initial, exits=exits))
        assert ranks.run(1, _merge, folder / f"runs/tune-{layer}", folder / f"runs/with-{layer}") == [""]
    base, first, both = (_parameters(folder / "runs" / run) for run in ("base", "with-3", "with-6"))
    assert not torch.equal(first["exits.3.norm.weight"], base["norm.weight"]), "it has learned"
    assert both.keys() == first.keys() | {name.replace("exits.3", "exits.6") for name in first}
    _assert_equal(both, first)
    _assert_equal(first, base)


@pytest.mark.slow
def test_gates_are_tuned_alone_on_exits_that_share_all_with_the_model(folder: Path, ranks: RankPool) -> None:
    """As of LayerSkip's recipe: what they share stays, and what holds for each exit is that of both runs."""
    recipe = {"layers": "all", "norm": "shared", "layerskip": {"curriculum": "none"}, "weight_schedule": {}}
    ranks.run(1, train, run_config(folder, name="recipe", exits=recipe, training={"train_iters": 4}))
    gated = {"layers": [3, 5], "norm": "shared", "gate": ["linear", "mlp"], "temperature": [1.0, 2.0]}
    (result,) = ranks.run(1, train, tune_config(folder, "gates", initial="recipe", exits=gated))
    losses = [result["figures"][iteration]["train/exit_3/gate_loss"] for iteration in (1, ITERS)]
    assert losses[1] < losses[0]
    assert ranks.run(1, _merge, folder / "runs/gates", folder / "runs/with-gates") == [""]
    base, gates, both = (_parameters(folder / "runs" / run) for run in ("recipe", "gates", "with-gates"))
    assert all(".gate." in name for name in gates)
    assert both.keys() == base.keys() | gates.keys()
    _assert_equal(both, base)
    _assert_equal(both, gates)
    exits = load_config(folder / "runs/with-gates/config.yaml").exits
    assert (exits.layers, exits.gated) == ((1, 2, 3, 4, 5, 6, 7), [3, 5])
    assert [exits.temperature_of(layer) for layer in (3, 4, 5)] == [1.0, 1.0, 2.0]
    own_norms = tune_config(folder, "own-norms", initial="recipe", exits={"layers": [3]})
    assert "has exits with exits.norm: shared, not own" in ranks.run(1, refusal, own_norms)[0]


def test_a_merge_writes_all_or_nothing(folder: Path, merged: Path, ranks: RankPool) -> None:
    runs = folder / "runs"
    before = {path: path.stat().st_mtime_ns for path in merged.rglob("*")}
    assert "exists; give a folder that does not" in ranks.run(1, _merge, runs / "tuned", merged)[0]
    assert before == {path: path.stat().st_mtime_ns for path in merged.rglob("*")}
    assert "holds a whole model" in ranks.run(1, _merge, runs / "base", runs / "nothing")[0]
    assert "cannot be a run" in ranks.run(1, _merge, runs / "tuned", runs / "no thing")[0]
    shutil.copytree(runs / "tuned", runs / "damaged")
    (shards, *_) = sorted((runs / "damaged/checkpoints").glob(f"step_{ITERS:08d}/*.distcp"))
    shards.write_bytes(shards.read_bytes()[:-1] + b"\0\0")
    assert "is damaged" in ranks.run(1, _merge, runs / "damaged", runs / "nothing")[0]
    assert "No space left" in ranks.run(1, _merge_on_a_full_disk, runs / "tuned", runs / "nothing")[0]
    assert not [path for path in runs.iterdir() if "nothing" in path.name or "no thing" in path.name]


def _merge_on_a_full_disk(tuned: Path, destination: Path) -> str:
    def full(path: Path, content: bytes) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ee.checkpoint.writing.write_file", full)
        return _merge(tuned, destination)


def test_console_and_alarms_name_no_final_exit(
    folder: Path, ranks: RankPool, tuned: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (said,) = ranks.run(1, _said, tune_config(folder, "said", training={"train_iters": 2}))
    assert "exit 2: " in said and "exit 5: " in said
    assert "final" not in said


def _said(config: Config) -> str:
    trainer = build_trainer(config, choose_device("cpu"))
    lines: list[str] = []
    console = trainer.loggers[0]
    console._logger = type("Log", (), {"info": lambda self, text, *parts: lines.append(text % parts)})()  # type: ignore[attr-defined]
    trainer.loggers = [console, Records()]
    trainer.train()
    return "\n".join(lines)


def test_a_step_with_an_idle_stage_is_traced(folder: Path, ranks: RankPool) -> None:
    config = tune_config(
        folder, "traced", parallel=IDLE, logging={"trace_iterations": [2]}, training={"train_iters": 2}
    )
    ranks.run(2, train, config)
    trace = read_trace(folder / "runs/traced/traces/step_00000002.json")
    assert [len(lane) for lane in trace.planned] == [8, 0], "F and X of four micro-batches"
    assert trace.recorded[1] == ()
