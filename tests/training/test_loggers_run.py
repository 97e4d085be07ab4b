"""Every destination of a real run, read back with the reader that it is meant for."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, write_small_dataset

from megatron_ee.config import Config, to_yaml
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

ROOT = Path(__file__).parents[2]
EXITS = (2, 5, 8)
TRAINING = {"train_iters": 10, "global_batch_size": 4, "micro_batch_size": 1, "eval_interval": 5, "eval_iters": 1}

KILLED_RUN = """
import os, signal, sys
from megatron_ee.config import load_config
from megatron_ee.device import choose_device

config = load_config(sys.argv[1])
device = choose_device(config.device)
from megatron_ee.training.build import build_trainer


class PowerCut:
    def log(self, iteration, figures):
        if iteration == int(sys.argv[2]):
            with (trainer.run_folder / "metrics.jsonl").open("a") as file:
                file.write('{"iteration": 99, "train/lo')
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self): ...


trainer = build_trainer(config, device)
trainer.loggers = [*trainer.loggers, PowerCut()]
trainer.train()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logged")
    write_small_dataset(folder)
    return folder


def _train_with_loggers(config: Config) -> None:
    """On each rank: a run as pretrain_ee.py does it, but for leaving the process groups."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(Path(config.runs) / "wandb-home"))
        trainer = build_trainer(config, choose_device("cpu"))
        trainer.train()
        for logger in trainer.loggers:
            logger.close()


def _records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Name of each scalar that TensorBoard would show, and its (step, value) pairs."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _history(run: Path) -> Iterator[dict[str, float]]:
    """What `wandb sync` would send as the run's history."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            yield record["history"]["item"]


@pytest.fixture(scope="module")
def logged(folder: Path, ranks: RankPool) -> Path:
    """The folder of a run on two stages, with all loggers."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    config = run_config(
        folder,
        name="logged",
        parallel={"pipeline": 2},
        training=TRAINING,
        checkpoint={"interval": 4},
        logging={"interval": 2, "tensorboard": True, "wandb": {"project": "exits", "mode": "offline"}},
    )
    ranks.run(2, _train_with_loggers, config)
    return folder / "runs/logged"


def test_the_record_names_every_figure(logged: Path) -> None:
    records = _records(logged)
    training = [record for record in records if "train/loss" in record]
    validation = [record for record in records if "val/loss" in record]
    assert [record["iteration"] for record in training] == [2, 4, 6, 8, 10]
    assert [record["iteration"] for record in validation] == [5, 10]
    per_exit = {f"exit_{layer}/{figure}" for layer in EXITS for figure in ("loss", "ppl", "accuracy", "weight")}
    memory = {"memory/peak_gib", "memory/stage_0_peak_gib", "memory/stage_1_peak_gib"}
    around, actions = ("rank_wait", "data", "prepare", "grad_sync", "optimizer"), ("forward", "exits", "backward")
    phases = {f"time/{phase}_s" for phase in (*around, *actions, "p2p_wait")}
    stages = ("bubble_fraction", "planned_bubble_fraction", "stage_0_busy_s", "stage_1_busy_s")
    pipeline = {f"pipeline/{figure}" for figure in stages}
    names = ("lr", "grad_norm", "skipped", "loss_scale", "tokens", "loss", "unmasked_tokens")
    run = {f"train/{name}" for name in names}
    pace = {"perf/tokens_per_s", "perf/iter_time_s", "perf/seconds_left"}
    expected = {"iteration", *(f"train/{name}" for name in per_exit), *memory, *phases, *pipeline, *run, *pace}
    assert training[0].keys() == expected, "nothing about GPUs, as there are none"
    assert training[2].keys() | {"pipeline/planned_bubble_fraction"} == {*expected, "time/checkpoint_s"}
    assert validation[0].keys() >= {f"val/{name}" for name in per_exit}
    assert [record["train/tokens"] for record in training] == [iteration * 4 * 16 for iteration in (2, 4, 6, 8, 10)]
    assert training[0]["memory/peak_gib"] == max(training[0][f"memory/stage_{stage}_peak_gib"] for stage in (0, 1))
    phases_s = sum(training[0][phase] for phase in phases)
    assert 0.95 * training[0]["perf/iter_time_s"] < phases_s < training[0]["perf/iter_time_s"]


def test_tensorboard_shows_every_exit_at_every_interval(logged: Path) -> None:
    scalars = _scalars(logged)
    for record in _records(logged):
        for name in record.keys() - {"iteration"}:
            values = dict(scalars[name])
            assert values[int(record["iteration"])] == pytest.approx(record[name], rel=1e-6), name
    for layer in EXITS:
        for figure in ("loss", "weight"):
            assert [step for step, _ in scalars[f"train/exit_{layer}/{figure}"]] == [2, 4, 6, 8, 10]
            assert [step for step, _ in scalars[f"val/exit_{layer}/{figure}"]] == [5, 10]


def test_wandb_has_every_exit_at_every_interval(logged: Path) -> None:
    history = {int(item["_step"]): item for item in _history(logged)}
    assert sorted(history) == [2, 4, 5, 6, 8, 10]
    for record in _records(logged):
        item = history[int(record["iteration"])]
        for name in record.keys() - {"iteration"}:
            assert item[name] == pytest.approx(record[name]), name
        kind = "train" if "train/loss" in record else "val"
        assert {f"{kind}/exit_{layer}/{figure}" for layer in EXITS for figure in ("loss", "weight")} <= item.keys()


def test_what_wandb_keeps_says_nothing_of_the_surroundings(logged: Path) -> None:
    (kept,) = logged.glob("wandb/offline-run-*/*.wandb")
    stored = kept.read_bytes()
    assert b"norm_epsilon" in stored, "the resolved config is there"
    assert os.environ["PATH"].encode() not in stored
    assert sys.executable.encode() not in stored
    assert not list(kept.parent.glob("files/*"))


def _run_until_killed(config: Path, iteration: int) -> int:
    """The exit status of a run in a process of its own. What it leaves behind is ended too: megatron-core's checkpoint
    writer keeps a helper that doesn't notice that its parent was killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_RUN, str(config), str(iteration)]
    with config.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 2])
def test_a_run_killed_and_resumed_has_one_continuous_record(folder: Path, ranks: RankPool, kills: int) -> None:
    pytest.importorskip("tensorboard")
    logs = {"interval": 1, "tensorboard": True}
    config = run_config(folder, name=f"killed-{kills}", training=TRAINING, checkpoint={"interval": 3}, logging=logs)
    path = folder / f"killed-{kills}.yaml"
    path.write_text(to_yaml(config))
    run = folder / f"runs/killed-{kills}"
    for iteration, newest in ((5, "step_00000003"), (8, "step_00000006"))[:kills]:
        assert _run_until_killed(path, iteration) == -signal.SIGKILL, path.with_suffix(".log").read_text()
        assert (run / "checkpoints/latest").resolve().name == newest
        assert not (run / "metrics.jsonl").read_bytes().endswith(b"\n"), "a line is torn"
    ranks.run(1, _train_with_loggers, config)

    records = _records(run)
    assert [record["iteration"] for record in records if "train/loss" in record] == list(range(1, 11))
    assert [record["iteration"] for record in records if "val/loss" in record] == [5, 10]
    assert records == sorted(records, key=lambda record: record["iteration"])
    for layer in EXITS:
        assert [step for step, _ in _scalars(run)[f"train/exit_{layer}/loss"]] == list(range(1, 11))
    lost_lines = (run / "metrics.jsonl.lost").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lost_lines if line.endswith("}")] == [4, 5, 7, 8][: 2 * kills]


def _train_with_a_failing_wandb(config: Config) -> list[str]:
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ee").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        _train_with_loggers(config)
    logging.getLogger("megatron_ee").removeHandler(handler)
    return warnings


def test_a_run_goes_on_without_wandb(folder: Path, ranks: RankPool) -> None:
    config = run_config(folder, name="without", logging={"interval": 2, "wandb": {"project": "exits"}})
    (warnings,) = ranks.run(1, _train_with_a_failing_wandb, config)
    assert [message for message in warnings if message.startswith("wandb: ")] == [
        "wandb: going on without, wandb is not installed: pip install 'megatron-ee[wandb]'"
    ]
    assert [record["iteration"] for record in _records(folder / "runs/without")] == [2, 4, 6]
