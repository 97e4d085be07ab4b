"""A run of two stages as users start it, and its record when nothing disturbs it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.long_run import has_iteration, read_losses, write_long_run

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 120
TRAIN_ITERS = 60


class StartedRun:
    """A run in its own processes; in a group of their own, if asked for, as those of a terminal or of a job are."""

    def __init__(self, config: Path, name: str, *overrides: str, own_group: bool = False, **environment: str) -> None:
        self.folder = config.parent / "runs" / name
        settings = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        hears_all = ["env", "--default-signal=INT"]  # tests that run in the background of a shell would pass it on deaf
        command = [*hears_all, str(ROOT / "scripts/train.sh"), str(config), f"name={name}", *overrides]
        # a file: a pipe stays open as long as whatever a killed rank has left behind
        self._log = config.parent / f"{name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, env=settings, stderr=log, start_new_session=own_group)

    def end(self) -> tuple[int, str]:
        """Wait for it; returns its exit status, and what it said."""
        return self.process.wait(timeout=TIMEOUT_S), self._log.read_text()

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """Until something is there, as long as the run goes."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_iteration(self, iteration: int) -> None:
        """Until the record has an iteration."""
        self.wait_for(lambda: has_iteration(self.folder, iteration))

    def losses(self) -> list[dict[str, float]]:
        """What the record says of losses, which nothing may change; not of times."""
        return read_losses(self.folder)

    def fault(self, attempt: int) -> dict:
        """What an attempt found wrong with its ranks."""
        return json.loads((self.folder / f"attempts/{attempt}/fault_0.json").read_text())

    def outcome(self, attempt: int) -> dict:
        """What an attempt left."""
        return json.loads((self.folder / f"attempts/{attempt}/outcome.json").read_text())

    def ranks(self) -> list[int]:
        """The process ids of those that train."""
        listed = subprocess.run(
            ["pgrep", "-f", f"^{sys.executable}.*pretrain_ee.py .*name={self.folder.name}( |$)"],
            capture_output=True,
            text=True,
            check=False,
        )
        commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in listed.stdout.split()}
        return [pid for pid, line in commands.items() if line.exists() and b"distributed.run" not in line.read_bytes()]


@pytest.fixture(scope="session")
def long_run_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_run(tmp_path_factory.mktemp("long"), train_iters=TRAIN_ITERS)


@pytest.fixture(scope="session")
def start_run(long_run_config: Path) -> Callable[..., StartedRun]:
    """Starts a run by its name, with overrides, and with environment variables by keyword."""
    return lambda name, *overrides, **settings: StartedRun(long_run_config, name, *overrides, **settings)


@pytest.fixture(scope="session")
def undisturbed(start_run: Callable[..., StartedRun]) -> list[dict[str, float]]:
    """The losses of a run that was left alone."""
    run = start_run("undisturbed")
    status, said = run.end()
    assert status == 0, said
    return run.losses()
