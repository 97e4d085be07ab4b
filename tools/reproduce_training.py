"""One run of the results from its config to its figures: trained, drafted with, and what it came to as data."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from metrics_file import losses_of, read_records
from reproduce_corpus import Corpus
from reproduce_runs import ROOT, Commands, Place, Run

from megatron_ee.config import load_config

QUICK = (
    "training.train_iters=6",
    "training.eval_interval=6",
    "training.eval_iters=1",
    "logging.interval=3",
    "checkpoint.interval=6",
    "model.hidden_size=64",
    "data.sequence_length=64",
)
DRAFTING_EXITS = (2, 4, 6)
DRAFT_LENGTH = 4
NEW_TOKENS = 64
SECONDS_PER_ITERATION = {"cpu": 4.0, "cuda": 0.1}
"""As measured: of two ranks on two cores, and of one of twelve runs that share an H200."""


def machine_overrides() -> list[str]:
    """What a config is told of the machine: one GPU trains in bf16, two cores as two data ranks in fp32."""
    if torch.cuda.is_available():
        return ["training.precision=bf16", "exits.loss_chunk_rows=4096"]
    return ["device=cpu", "parallel.data=2", "training.micro_batch_size=8"]


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


def train_and_measure(run: Run, place: Place, corpus: Corpus, commands: Commands) -> dict[str, Any]:
    """All that is not there yet of one run, and its figures.

    Raises:
        StoppedError, UserError: see `Commands.run`.
    """
    log = place.folder / "logs" / f"{run.name}.log"
    folder = place.folder / run.name
    if not place.is_trained(run):
        commands.run([ROOT / "scripts/train.sh", place.config_path(run), *place.settings(run)], log)
    if run.drafts and not _drafting_file(folder).exists():
        decoded = folder
        if run.initial is not None:
            decoded = folder.with_name(f"{run.name}-merged")
            if not decoded.exists():
                commands.run([sys.executable, ROOT / "tools/merge_exits.py", folder, decoded], log)
        commands.run(_drafting_command(decoded, folder, corpus), log)
    return figures_of(run, folder)


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


def _drafting_command(decoded: Path, folder: Path, corpus: Corpus) -> list[object]:
    return [
        sys.executable,
        ROOT / "tools/sweep.py",
        "speculation",
        *("--checkpoint", decoded, "--prompts", corpus.prompts, "--output", _drafting_file(folder).parent),
        *("--exits", ",".join(map(str, DRAFTING_EXITS)), "--lengths", DRAFT_LENGTH, "--rounds", 1),
        f"inference.sampling.max_new_tokens={NEW_TOKENS}",
        "inference.max_batch_size=32",
    ]
