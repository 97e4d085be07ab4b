"""Whole runs on a small dataset, for tests of the trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny import tiny_config
from megatron_ee.config import Config
from megatron_ee.data.indexed import write_indexed
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import ByteTokenizer
from megatron_ee.training.build import build_trainer

WORDS = tuple("early exits let a token leave when settled while deeper layers catch up".split())  # noqa: SIM905


def write_small_dataset(folder: Path) -> Path:
    """Some 40 kB of words in pseudo-random order; returns the path prefix."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(20, 120))) for _ in range(120)]
    prefix = folder / "words"
    write_indexed(prefix, texts, ByteTokenizer())
    return prefix


def run_config(folder: Path, **changes: Any) -> Config:
    """A tiny model's run on the small dataset in `folder`."""
    data = {"dataset": str(folder / "words"), "folder": str(folder / "data"), "sequence_length": 16}
    defaults: dict[str, Any] = {
        "runs": str(folder / "runs"),
        "model": {"vocab_size": "auto"},
        "data": data,
        "training": {"train_iters": 6, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 0},
        "exits": {"layers": [2, 5], "weight_schedule": {"warmup_iters": 4}},
    }
    for section, fields in changes.items():
        given = defaults.get(section)
        defaults[section] = {**given, **fields} if isinstance(fields, dict) and given else fields
    return tiny_config(**defaults)


class Records:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        self.figures.setdefault(iteration, {}).update(figures)

    def close(self) -> None: ...


def train(config: Config, until: int | None = None, *, save: bool = False) -> dict[str, Any]:
    """On each rank: build, train, and return figures per iteration (of the main rank) and the final parameters."""
    trainer = build_trainer(config, choose_device("cpu"))
    started_at = trainer.progress.iteration
    records = Records()
    trainer.loggers = [records] if trainer.mesh.is_main else []
    trainer.train(until)
    if save:
        trainer.save()
    parameters = {
        name: parameter.detach().float().numpy().copy() for name, parameter in trainer.stage.named_parameters()
    }
    return {"started_at": started_at, "figures": records.figures, "parameters": parameters}


def train_and_save(config: Config) -> None:
    """On each rank: a run whose checkpoint is all that is wanted. (Not in the tests' own process: a run sets up how the
    process logs, and leaves the threads of its groups.)"""
    train(config, save=True)


def refusal(config: Config) -> str:
    """On each rank: what a config is refused for, when a run is built."""
    try:
        build_trainer(config, choose_device("cpu"))
    except UserError as error:
        return str(error)
    return "nothing was refused"
