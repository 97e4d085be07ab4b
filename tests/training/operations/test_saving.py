"""A run whose disk fills up, as users see it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.disks import small_disk
from helpers.runs import write_small_dataset

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.training.operations.attempts import COMPLETE, REFUSED

TRAIN_ITERS, TIMEOUT_S = 600, 120
CONFIG = """\
name: filled
runs: {runs}
device: cpu
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64}}
data: {{dataset: {folder}/words, folder: {folder}/data, sequence_length: 32}}
training: {{train_iters: {iters}, global_batch_size: 2, micro_batch_size: 1, eval_iters: 0}}
checkpoint: {{interval: 10, keep_last: 2}}
logging: {{interval: 1}}
"""


class _Run:
    def __init__(self, config: Path, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            command = [sys.executable, "-W", "ignore", "-m", "megatron_ee.training", str(config)]
            self.process = subprocess.Popen(command, env=environment, stderr=file)

    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)


@pytest.mark.slow
def test_a_run_outlives_a_full_disk_and_a_stop_that_saves_nothing_is_a_failure(tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    path = tmp_path / "run.yaml"
    with small_disk(tmp_path, megabytes=16) as disk:
        path.write_text(CONFIG.format(runs=disk.path, folder=tmp_path, iters=TRAIN_ITERS))
        folder = disk.path / "filled"
        run = _Run(path, tmp_path / "log")
        run.wait_for(lambda: newest_checkpoint(folder) is not None)
        disk.fill()
        run.wait_for(lambda: run.said().count("training goes on") >= 2)
        last = newest_checkpoint(folder)
        disk.free()
        run.wait_for(lambda: newest_checkpoint(folder) != last)
        num_failed = run.said().count("training goes on")
        disk.fill()
        run.wait_for(lambda: run.said().count("training goes on") > num_failed)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(TIMEOUT_S) == REFUSED, "what a scheduler would start again for ever"
        said = run.said()
        assert "Traceback" not in said
        assert "No space left on device" in said.splitlines()[-1]
        assert "metrics.jsonl cannot be written" in said
        disk.free()
        again = _Run(path, tmp_path / "log.again")
        assert again.process.wait(TIMEOUT_S) == COMPLETE, again.said()
        assert "resumed from" in again.said()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == list(range(1, TRAIN_ITERS + 1))
