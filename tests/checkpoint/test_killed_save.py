"""A run that is killed while it saves loses that save and nothing else, whenever it happens."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.killed_saves import KILLED, PREPARE_DEATH, SAVED, UNDISTURBED
from helpers.ranks import RankPool
from helpers.runs import run_config, write_small_dataset

from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.folders import is_whole, newest_checkpoint, step_folder
from megatron_ee.config import Config, load_config, to_yaml
from megatron_ee.device import choose_device
from megatron_ee.inference.loading import load_model
from megatron_ee.parallel.mesh import close_mesh
from megatron_ee.training.build import build_trainer

ROOT = Path(__file__).parents[2]
SAVES = (SAVED, KILLED, 6)
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
MEASURED = ("perf/", "time/", "pipeline/", "memory/")
IN_EVERY_TEST_RUN = ("while-training", "half-a-description", "link-aside")

SWEEP = """
import sys
from pathlib import Path

from megatron_ee.device import choose_device

choose_device("cpu")  # megatron-core, which the next line imports, needs a chosen device
from helpers.killed_saves import kill_and_start_again

kill_and_start_again(Path(sys.argv[1]), sys.argv[2:])
"""


def _write_config(folder: Path, name: str, *, stages: int) -> Path:
    write_small_dataset(folder)
    config = run_config(
        folder,
        name=name,
        parallel={"pipeline": stages},
        training={"train_iters": SAVES[-1], "eval_iters": 1},
        checkpoint={"interval": SAVED},
    )
    path = folder / "run.yaml"
    path.write_text(to_yaml(config))
    return path


def _losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith(MEASURED)} for record in records]


Parameters = dict[str, np.ndarray]


def _parameters(*steps: Path) -> list[Parameters]:
    """Of each step folder, opened on one process."""
    loaded = []
    for step in steps:
        close_mesh()
        model = load_model(step, load_config(step / "config.yaml"), choose_device("cpu"))
        loaded.append({name: value.numpy().copy() for name, value in model.stage.named_parameters()})
    return loaded


class Undisturbed:
    """The run as it is when nobody kills it, in `folder`."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self._folder, self._ranks = folder, ranks
        self.losses = _losses(folder)
        (self._parameters,) = ranks.run(1, _parameters, *(step_folder(folder, iteration) for iteration in SAVES))

    def check_parameters(self, *steps: Path) -> None:
        """Each of these step folders can be opened, and holds what this run's does."""
        (loaded,) = self._ranks.run(1, _parameters, *steps)
        for step, parameters in zip(steps, loaded, strict=True):
            expected = self._parameters[SAVES.index(read_description(step).progress.iteration)]
            assert parameters.keys() == expected.keys()
            for name, parameter in expected.items():
                np.testing.assert_array_equal(parameters[name], parameter, err_msg=name)

    def check_end(self, run: Path) -> None:
        """A run that was killed and started again has nothing less, nothing else and nothing more than this one."""
        assert _losses(run) == self.losses
        assert _names(run / "checkpoints") == _names(self._folder / "checkpoints")
        assert (run / "checkpoints/latest").resolve() == newest_checkpoint(run) == step_folder(run, SAVES[-1])
        for iteration in SAVES:
            assert _names(step_folder(run, iteration)) == _names(step_folder(self._folder, iteration))
        self.check_parameters(step_folder(run, KILLED), step_folder(run, SAVES[-1]))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that were killed in a step of a save and started again: those that will be looked at."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected = [item.callspec.params for item in items if "sweep" in item.fixturenames]
    folder = tmp_path_factory.mktemp("sweep")
    config = _write_config(folder, UNDISTURBED, stages=1)
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", SWEEP, str(config), *(str(params["name"]) for params in selected)]
        subprocess.run(command, env=ENVIRONMENT, stdout=log, stderr=log, timeout=300, check=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(sweep: Path, ranks: RankPool) -> Undisturbed:
    return Undisturbed(sweep / "runs" / UNDISTURBED, ranks)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_TEST_RUN else pytest.mark.slow) for name in PREPARE_DEATH]
)
def test_a_run_killed_in_any_step_of_a_save_goes_on_as_if_nothing_had_been(
    sweep: Path, undisturbed: Undisturbed, name: str
) -> None:
    statuses = json.loads((sweep / "statuses.json").read_text())
    assert statuses[name] == [-signal.SIGKILL, 0], (sweep / f"{name}.killed").read_text()
    killed = sweep / "killed" / name
    newest, latest = newest_checkpoint(killed), (killed / "checkpoints/latest").resolve()
    assert newest == step_folder(killed, KILLED if name in ("no-link", "link-aside", "linked") else SAVED)
    assert latest == step_folder(killed, KILLED if name == "linked" else SAVED)
    undisturbed.check_parameters(newest, latest)
    assert f"{newest.name}\n" in (sweep / f"{name}.log").read_text().partition("resumed from")[2]
    undisturbed.check_end(sweep / "runs" / name)


def _start(config: Path, name: str, log: Path) -> subprocess.Popen:
    """A run as a user starts it, in two processes, leader of a group."""
    command = [str(ROOT / "scripts/train.sh"), str(config), f"name={name}"]
    with log.open("w") as file:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)


def _wait_until(reached: Callable[[Path], bool], step: Path, launcher: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached(step):
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.0005)


def _kill_when(reached: Callable[[Path], bool], config: Path, name: str) -> bool:
    """Whether a run was killed in its second save, at this point of it or soon after; it may have been too quick."""
    run, log = config.parent / "runs" / name, config.parent / f"{name}.killed"
    launcher = _start(config, name, log)
    ranks: list[psutil.Process] = []  # each leads a group of its own
    try:
        _wait_until(is_whole, step_folder(run, SAVED), launcher, log)
        ranks = psutil.Process(launcher.pid).children()
        _wait_until(reached, step_folder(run, KILLED), launcher, log)
    finally:
        for group in (launcher.pid, *(rank.pid for rank in ranks)):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    psutil.wait_procs(ranks)  # one that is killed ends what it has asked the system for
    return not is_whole(step_folder(run, KILLED))


def _train_in_the_pool(config: Config) -> None:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.train()
    for logger in trainer.loggers:
        logger.close()


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two stages."""
    return _write_config(tmp_path_factory.mktemp("two-stages"), UNDISTURBED, stages=2)


@pytest.fixture(scope="module")
def undisturbed_stages(two_stages: Path, ranks: RankPool) -> Undisturbed:
    ranks.run(2, _train_in_the_pool, load_config(two_stages))
    return Undisturbed(two_stages.parent / "runs" / UNDISTURBED, ranks)


@pytest.mark.parametrize(
    "reached",
    [
        pytest.param(lambda step: step.is_dir(), id="folder", marks=pytest.mark.slow),
        pytest.param(lambda step: any(step.glob("__*")), id="first-shard", marks=pytest.mark.slow),
        pytest.param(lambda step: (step / "places.json").exists(), id="all-shards", marks=pytest.mark.slow),
    ],
)
def test_two_processes_killed_while_they_save_go_on_as_if_nothing_had_been(
    two_stages: Path, undisturbed_stages: Undisturbed, request: pytest.FixtureRequest, reached: Callable[[Path], bool]
) -> None:
    names = [f"{request.node.callspec.id}-{attempt}" for attempt in range(3)]
    name = next((name for name in names if _kill_when(reached, two_stages, name)), None)
    assert name is not None, f"the save was over before it was killed, {len(names)} times"
    run, log = two_stages.parent / "runs" / name, two_stages.parent / f"{name}.log"
    saved = step_folder(run, SAVED)
    assert newest_checkpoint(run) == (run / "checkpoints/latest").resolve() == saved
    undisturbed_stages.check_parameters(saved)
    assert _start(two_stages, name, log).wait(timeout=120) == 0, log.read_text()
    assert f"resumed from {saved}\n" in log.read_text()
    undisturbed_stages.check_end(run)
