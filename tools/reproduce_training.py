"""One run of the results from its config to its figures: trained, drafted with, and what it came to as data."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from metrics_file import losses_of, read_records
from reproduce_corpus import NUM_PROMPTS, QUICK_VOCAB_SIZE, Corpus
from reproduce_runs import FailedError, Place, Run, StoppedError

from megatron_ee.checkpoint.folders import find_model
from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import load_config, open_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.inference.json_files import write_json
from megatron_ee.inference.llm import LLM, open_model
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.prompts import read_prompts
from megatron_ee.log import quiet_dependencies
from megatron_ee.training.__main__ import train
from megatron_ee.training.operations.attempts import STOPPED
from megatron_ee.training.operations.stopping import StopRequests, end_with

QUICK = (
    "training.train_iters=6",
    "training.eval_interval=6",
    "training.eval_iters=1",
    "logging.interval=3",
    "checkpoint.interval=6",
    "model.hidden_size=64",
    f"model.vocab_size={QUICK_VOCAB_SIZE}",
    "data.sequence_length=64",
)
DRAFTING_EXITS = (2, 4, 6)
DRAFT_LENGTH = 4
NEW_TOKENS = 64
SECONDS_PER_ITERATION = {"cpu": 8.0, "cuda": 0.07}
"""Roughly, for the budget: on one core, and of one of fifteen runs that share an H200."""


def machine_overrides() -> list[str]:
    """What a config is told of the machine: a GPU trains in bf16, with all of an exit's logits at once."""
    return ["training.precision=bf16", "exits.loss_chunk_rows=0"] if torch.cuda.is_available() else ["device=cpu"]


def budget(runs: Sequence[Run], place: Place) -> str:
    """A table: every kind of run, how many there are, and how long one takes."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    lines, total = [f"{'config':<20}{'seeds':>6}{'iterations':>12}{'tokens each':>14}{'minutes each':>14}"], 0.0
    for config in dict.fromkeys(run.config for run in runs):
        alike = [run for run in runs if run.config == config]
        resolved = load_config(place.config_path(alike[0]), place.settings(alike[0]))
        iterations = resolved.training.train_iters
        tokens = iterations * resolved.training.global_batch_size * resolved.data.sequence_length
        minutes = iterations * SECONDS_PER_ITERATION[kind] / 60
        total += minutes * len(alike)
        lines.append(f"{config:<20}{len(alike):>6}{iterations:>12}{tokens:>14,}{minutes:>14.1f}")
    return "\n".join([*lines, f"in all {len(runs)} runs, {total / 60:.1f} hours one after another on this machine"])


class Work:
    """What a worker process does of a run: all that is not there yet, and its figures."""

    def __init__(self, place: Place, corpus: Corpus, *, quick: bool) -> None:
        self._place, self._corpus = place, corpus
        self._num_prompts, self._new_tokens = (4, 8) if quick else (NUM_PROMPTS, NEW_TOKENS)

    def __call__(self, run: Run) -> dict[str, Any]:
        """
        Raises:
            FailedError: something has to be changed.
            StoppedError: a signal came.
        """
        folder = self._place.folder / run.name
        try:
            if not self._place.is_trained(run):
                self._train(run)
            if run.drafts and not _drafting_file(folder).exists():
                self._measure_drafting(run, folder)
        except UserError as error:
            raise FailedError(str(error)) from None
        return figures_of(run, folder)

    def _train(self, run: Run) -> None:
        from megatron_ee.training.build import build_trainer  # imports megatron-core, which needs a chosen device

        requests = StopRequests()
        requests.listen()
        with open_config(self._place.config_path(run), self._place.settings(run), read_model=read_model) as config:
            status = train(build_trainer(config, choose_device(config.device), requests))
        requests.ignore()
        if status == STOPPED:
            raise StoppedError

    def _measure_drafting(self, run: Run, folder: Path) -> None:
        """How many drafted tokens full depth accepts, at each of some exits."""
        import sweep_speculation

        from megatron_ee.checkpoint.merge import merge_exits
        from megatron_ee.parallel.mesh import close_mesh

        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it is done again
        decoded = folder
        if run.initial is not None:
            decoded = folder.with_name(f"{run.name}-merged")
            if not decoded.exists():
                merge_exits(folder, decoded, choose_device("auto"))
                close_mesh()
        overrides = [f"inference.sampling.max_new_tokens={self._new_tokens}", "inference.max_batch_size=32"]
        step = find_model(decoded)
        with open_decoding_config(step, overrides) as config:
            llm = LLM.of(open_model(step, config), config)
            prompts = read_prompts(self._corpus.prompts)[: self._num_prompts]
            swept = sweep_speculation.sweep(llm, prompts, exits=DRAFTING_EXITS, lengths=(DRAFT_LENGTH,), rounds=1)
        close_mesh()
        write_json(_drafting_file(folder), swept.content)


def begin(log: Path) -> None:
    """What a worker process does first: its words go to a file, and it ends with its parent."""
    end_with(parent=os.getppid())
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log.with_name(f"{os.getpid()}.log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    quiet_dependencies()
    choose_device("auto")


def figures_of(run: Run, folder: Path) -> dict[str, Any]:
    """What a trained run came to: losses of the last validation in nats per token by exit layer, and what it took."""
    records = read_records(folder)
    last = losses_of(records).validation[-1]
    validation = next(of for of in reversed(records) if of["iteration"] == last.iteration and "val/loss" in of)
    training = [of for of in records if "perf/iter_time_s" in of]
    config = load_config(folder / "config.yaml")
    environment = json.loads(max((folder / "attempts").glob("*/environment.json")).read_text())
    drafting = _drafting_file(folder)
    return {
        "config": run.config,
        "seed": run.seed,
        "iterations": last.iteration,
        "tokens": last.iteration * config.training.global_batch_size * config.data.sequence_length,
        "precision": config.training.precision,
        "packages": {name: environment["packages"][name] for name in ("torch", "megatron-core")},
        "gpus": environment["gpus"],
        "loss": {str(layer): loss for layer, loss in last.losses.items()},
        "accuracy": {str(layer): validation[f"val/exit_{layer}/accuracy"] for layer in last.losses},
        "curve": [
            [of.iteration, {str(layer): round(loss, 4) for layer, loss in of.losses.items()}]
            for of in losses_of(records).training
        ],
        "seconds_per_iteration": sorted(of["perf/iter_time_s"] for of in training)[len(training) // 2],
        "peak_gib": max((of.get("memory/peak_gib", 0.0) for of in training), default=0.0),
        "drafting": json.loads(drafting.read_text())["cells"] if drafting.exists() else [],
    }


def _drafting_file(folder: Path) -> Path:
    return folder / "drafting/speculation.json"
