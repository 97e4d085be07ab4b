"""A run of two stages that is long enough to be disturbed, started as users start it, and what its record says."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.runs import write_small_dataset
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
TRAIN_ITERS = 60

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


def write_long_run(folder: Path) -> Path:
    """Its dataset and its config, which wants a name; returns the config's path."""
    write_small_dataset(folder)
    path = folder / "long.yaml"
    path.write_text(CONFIG.format(folder=folder, iters=TRAIN_ITERS))
    return path


def train_to_the_end(config: Config) -> None:
    """On each rank."""
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.train()
    for logger in trainer.loggers:
        logger.close()


def read_losses(run: Path) -> list[dict[str, float]]:
    """What the record says of losses, which nothing may change; not of times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: of[name] for name in of if name == "iteration" or name.startswith(("train/", "val/"))} for of in records
    ]


def has_iteration(run: Path, iteration: int) -> bool:
    """Whether the record has come to an iteration."""
    path = run / "metrics.jsonl"
    return path.exists() and f'"iteration": {iteration},' in path.read_text()


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
