"""What data costs beside a step, and how long a run takes from its imports to its first step."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_report import Measure, measure_of, take_turns
from bench_train_setup import SMALL, Sizes, config_of, context_of

from megatron_ee.config import to_yaml
from megatron_ee.data.indexed import write_indexed
from megatron_ee.tokenizer import BYTES, open_tokenizer

# torch imports its compiler when the first optimizer is made: half a second that belongs to the imports.
_IMPORTS = """
from megatron_ee.device import choose_device
choose_device("cpu")
import megatron_ee.training.build
import torch._dynamo
print(flush=True)
"""


def start_measures(folder: Path, *, small: bool) -> list[Measure]:
    """Of runs as users start them, on one process, whose data is prepared and whose folders are new."""
    sizes = SMALL if small else Sizes()
    runs = _Runs(sizes, folder)
    runs.first_step()  # prepares the data's index
    rounds = take_turns(sizes.rounds if small else 8, _imports, runs.first_step)
    beyond = [first - imports for imports, first in zip(rounds.a, rounds.b, strict=True)]
    context = context_of(sizes, imports_s=rounds.a, first_step_s=rounds.b)
    waits = runs.data_over_step(num_iters=10 if small else 40)
    return [
        measure_of("data_over_step", waits, "lower", 1.0, context_of(sizes), goal=0.01),
        measure_of("first_step_beyond_imports_s", beyond, "lower", rounds.aa, context, goal=2.0),
    ]


class _Runs:
    """Each in a folder of its own, on the same words."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        texts = [" ".join(str(number) for number in range(start, start + 500)) for start in range(0, 100_000, 500)]
        write_indexed(folder / "numbers", texts, open_tokenizer(BYTES))
        config = config_of(sizes, sizes.two_exits, num_microbatches=sizes.num_microbatches)
        data = {"dataset": str(folder / "numbers"), "folder": str(folder / "data")}
        self._folder, self._number, self._path = folder, 0, folder / "run.yaml"
        changes: dict[str, Any] = {
            "runs": str(folder / "started"),
            "device": "cpu",
            "data": config.data.model_copy(update=data),
            "logging": config.logging.model_copy(update={"interval": 1}),
        }
        self._path.write_text(to_yaml(config.model_copy(update=changes)))

    def first_step(self) -> float:
        """Seconds from the start of the program to the record of its first step, one of a single sequence.

        How long the arithmetic of a large step takes says nothing about starting.
        """
        started = time.perf_counter()
        process, record = self._start(1, "training.global_batch_size=1", "training.micro_batch_size=1")
        while not record.exists() or not record.stat().st_size:
            if process.poll() not in (None, 0):
                raise RuntimeError("the run failed")
            time.sleep(0.002)
        seconds = time.perf_counter() - started
        process.wait()
        return seconds

    def data_over_step(self, num_iters: int) -> list[float]:
        """Of each step but the first ones, what share it waits for its batch."""
        process, record = self._start(num_iters)
        if process.wait():
            raise RuntimeError("the run failed")
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        return [line["time/data_s"] / line["perf/iter_time_s"] for line in lines if "time/data_s" in line][3:]

    def _start(self, train_iters: int, *overrides: str) -> tuple[subprocess.Popen[bytes], Path]:
        self._number += 1
        overrides = (f"name=run-{self._number}", f"training.train_iters={train_iters}", *overrides)
        command = [sys.executable, "-m", "megatron_ee.training", str(self._path), *overrides]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return process, self._folder / "started" / f"run-{self._number}" / "metrics.jsonl"


def _imports() -> float:
    """Seconds to start Python and import what a run imports, without how long Python takes to end."""
    started = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", _IMPORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if not process.stdout or not process.stdout.readline():
            raise RuntimeError("the imports failed")
        return time.perf_counter() - started
