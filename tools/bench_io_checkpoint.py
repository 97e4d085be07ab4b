"""Checkpoints beside the bare disk: saving and loading, and how long training stands still for a save."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_gpu import build
from bench_report import Measure, Rounds, measure_of, take_turns
from bench_train_setup import SMALL, Sizes, config_of, context_of, random_batch

from megatron_ee.checkpoint.folders import newest_checkpoint
from megatron_ee.config import Config, ParallelConfig
from megatron_ee.device import choose_device

if TYPE_CHECKING:
    from megatron_ee.training.trainer import Trainer

A_GIGABYTE = Sizes(
    num_layers=6,
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=16,
    sequence_length=16,
    micro_batch_size=1,
    num_microbatches=1,
)
"""With both moments of each parameter."""

_CHUNK = 2**24


def checkpoint_measures(folder: Path, *, small: bool) -> list[Measure]:
    """On the disk that has `folder`."""
    sizes = SMALL if small else A_GIGABYTE
    device = choose_device("cpu")
    from megatron_ee.parallel.mesh import close_mesh, open_mesh

    mesh = open_mesh(ParallelConfig(), device)
    trainer = build(_config(sizes, folder), mesh)
    trainer.train_step(random_batch(trainer.config), 0)
    bench = _Bench(trainer, folder)
    rounds = [
        ("save_over_raw_write", 0.85, take_turns(sizes.rounds, bench.save, bench.raw_write)),
        ("load_over_raw_read", 0.85, take_turns(sizes.rounds, bench.load, bench.raw_read)),
        ("unverified_load_over_raw_read", 0.85, take_turns(sizes.rounds, bench.unverified_load, bench.raw_read)),
        ("blocking_over_memory_copy", 1.5, take_turns(sizes.rounds, bench.memory_copy, bench.blocking)),
    ]
    close_mesh()
    context = context_of(sizes, num_bytes=bench.num_bytes, first_blocking_s=bench.first_blocking_s)
    return [_measure(name, goal, of, context) for name, goal, of in rounds]


def _measure(name: str, goal: float, rounds: Rounds, context: dict[str, Any]) -> Measure:
    seconds = {"a_s": statistics.median(rounds.a), "b_s": statistics.median(rounds.b)}
    better: Any = "lower" if goal > 1 else "higher"
    return measure_of(name, rounds.paired, better, rounds.aa, context | seconds, goal=goal)


def _config(sizes: Sizes, folder: Path) -> Config:
    config = config_of(sizes, sizes.two_exits, num_microbatches=sizes.num_microbatches)
    return config.model_copy(update={"runs": str(folder / "runs")})


class _Bench:
    """Each method is one side of a round: its seconds, without what it has to put in order before."""

    def __init__(self, trainer: "Trainer", folder: Path) -> None:
        self._trainer, self._raw = trainer, folder / "raw"
        self.first_blocking_s = self.blocking()  # takes the memory for copies, and works out who writes what
        self.num_bytes = sum(path.stat().st_size for path in self._newest().iterdir())
        self._memory = torch.randint(256, (self.num_bytes,), dtype=torch.uint8)
        self._copy = self._memory.clone()

    def save(self) -> float:
        """From the state in memory to a checkpoint on the disk."""
        self._next_iteration()
        return _seconds(self._trainer.save)

    def raw_write(self) -> float:
        """As many bytes, in one file, and on the disk too."""
        self._raw.unlink(missing_ok=True)
        return _seconds(self._write)

    def load(self) -> float:
        """From a disk that nobody has read yet, with verification, to a trainer that could go on."""
        return self._load(verifies=True)

    def unverified_load(self) -> float:
        """Likewise, with `checkpoint.verify: false`."""
        return self._load(verifies=False)

    def raw_read(self) -> float:
        """As many bytes, likewise."""
        _forget([self._raw])
        return _seconds(self._read)

    def memory_copy(self) -> float:
        """As many bytes, to memory that was used before."""
        return _seconds(lambda: self._copy.copy_(self._memory))

    def blocking(self) -> float:
        """What a save adds to the steps in which it begins and ends. Between them it writes, and this waits."""
        self._next_iteration()
        saving = self._trainer.saving
        seconds = _seconds(self._trainer.start_saving)
        while saving.is_writing():
            time.sleep(0.01)
        return seconds + _seconds(saving.settle)

    def _next_iteration(self) -> None:
        """Make room on the disk, and be where nothing is saved yet."""
        if self._trainer.progress.iteration:
            shutil.rmtree(self._newest())
        self._trainer.progress = replace(self._trainer.progress, iteration=self._trainer.progress.iteration + 1)

    def _newest(self) -> Path:
        folder = newest_checkpoint(self._trainer.run_folder)
        assert folder is not None, "nothing is saved"
        return folder

    def _load(self, *, verifies: bool) -> float:
        _forget(self._newest().iterdir())
        return _seconds(lambda: self._resume(verifies=verifies))

    def _resume(self, *, verifies: bool) -> None:
        from megatron_ee.checkpoint.resume import ResumableCheckpoints

        checkpoints = ResumableCheckpoints(self._trainer.run_folder, self._trainer.mesh, verifies=verifies)
        folder = checkpoints.newest()
        assert folder is not None, "nothing is saved"
        checkpoint = self._trainer.config.checkpoint.model_copy(update={"verify": verifies})
        self._trainer.config = self._trainer.config.model_copy(update={"checkpoint": checkpoint})
        self._trainer.load(folder)
        checkpoints.accept(folder)

    def _write(self) -> None:
        content = self._memory.numpy().data
        with self._raw.open("wb", buffering=0) as file:
            for start in range(0, self.num_bytes, _CHUNK):
                file.write(content[start : start + _CHUNK])
            os.fsync(file.fileno())

    def _read(self) -> None:
        content = self._copy.numpy().data
        with self._raw.open("rb", buffering=0) as file:
            for start in range(0, self.num_bytes, _CHUNK):
                file.readinto(content[start : start + _CHUNK])


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _forget(files: Iterable[Path]) -> None:
    """Files are read from the disk the next time, not from memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
