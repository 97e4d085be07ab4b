"""A run of two stages as users start it, and its record when nothing disturbs it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import write_small_dataset

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 120
TRAIN_ITERS = 120

CONFIG = """\
runs: {folder}/runs
device: cpu
model: {{num_layers: 4, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
exits: {{layers: [1, 2], weight_schedule: {{warmup_iters: 4}}}}
parallel: {{pipeline: 2}}
data: {{dataset: {folder}/words, folder: {folder}/data, sequence_length: 32}}
training: {{train_iters: {iters}, global_batch_size: 8, micro_batch_size: 1, eval_interval: 30, eval_iters: 1}}
optimizer: {{lr: 1e-2}}
checkpoint: {{interval: 25}}
logging: {{interval: 7}}
"""


class StartedRun:
    """A run in its own processes."""

    def __init__(self, config: Path, name: str, *overrides: str, **environment: str) -> None:
        self.folder = config.parent / "runs" / name
        settings = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        command = [str(ROOT / "scripts/train.sh"), str(config), f"name={name}", *overrides]
        # a file: a pipe stays open as long as whatever a killed rank has left behind
        self._log = config.parent / f"{name}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, env=settings, stderr=log)

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
        path = self.folder / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and f'"iteration": {iteration},' in path.read_text())

    def losses(self) -> list[dict[str, float]]:
        """What the record says of losses, which nothing may change; not of times."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: of[name] for name in of if name == "iteration" or name.startswith(("train/", "val/"))}
            for of in records
        ]

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
    folder = tmp_path_factory.mktemp("long")
    write_small_dataset(folder)
    path = folder / "long.yaml"
    path.write_text(CONFIG.format(folder=folder, iters=TRAIN_ITERS))
    return path


@pytest.fixture(scope="session")
def start_run(long_run_config: Path) -> Callable[..., StartedRun]:
    """Starts a run by its name, with overrides, and with environment variables by keyword."""
    return lambda name, *overrides, **environment: StartedRun(long_run_config, name, *overrides, **environment)


@pytest.fixture(scope="session")
def undisturbed(start_run: Callable[..., StartedRun]) -> list[dict[str, float]]:
    """The losses of a run that was left alone."""
    run = start_run("undisturbed")
    status, said = run.end()
    assert status == 0, said
    return run.losses()
