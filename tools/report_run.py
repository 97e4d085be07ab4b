"""Reads a run's folder for its report: what was logged, how each start went, which checkpoints there are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metrics_file import Metrics, Record, exit_names, losses_of, read_records

from megatron_ee.checkpoint.folders import FORMAT_FILE, whole_checkpoints
from megatron_ee.config import Config, load_config
from megatron_ee.errors import UserError

SPOILT_BATCHES = "nonfinite.jsonl"  # what `megatron_ee.training.operations.skipping` calls it, which imports torch


class ReportError(UserError):
    """A folder is no run's, or a file in it cannot be read."""


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        environment: what it ran on; empty where it was not written.
        outcome: how it ended; empty: it has not, or was killed.
        faults: what machines found wrong with its ranks.
        spoilt_batches: steps whose gradients were no numbers.
    """

    number: int
    environment: Mapping[str, Any]
    outcome: Mapping[str, Any]
    faults: Sequence[Mapping[str, Any]]
    spoilt_batches: int

    @property
    def num_processes(self) -> int | None:
        """None: it was not noted."""
        variables = self.environment.get("variables")
        size = str(variables.get("WORLD_SIZE", "")) if isinstance(variables, dict) else ""
        return int(size) if size.isdecimal() and int(size) else None


@dataclass(frozen=True)
class Checkpoint:
    """A whole one.

    Attributes:
        about: its format.json, of whatever version.
    """

    iteration: int
    num_bytes: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        records: none where nothing has been logged yet.
        lost_records: of iterations that were done again after a failure.
        config: None: there is no config.yaml.
        heartbeat: the last sign of life; empty where there is none.
        other_steps: names of step folders that are no checkpoints: damaged, or not saved to the end.
    """

    folder: Path
    records: Sequence[Record]
    lost_records: int
    config: Config | None
    config_text: str
    starts: Sequence[Start]
    heartbeat: Mapping[str, Any]
    checkpoints: Sequence[Checkpoint]
    other_steps: Sequence[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def losses(self) -> Metrics:
        """By exit."""
        return losses_of(self.records)

    @cached_property
    def exit_names(self) -> dict[int, str]:
        """Of all exits that have losses, ascending."""
        layers = sorted({layer for of in (*self.losses.training, *self.losses.validation) for layer in of.losses})
        return exit_names(layers, self.folder) if layers else {}

    @property
    def last_iteration(self) -> int:
        """Of the record; 0: it is empty."""
        return max((int(record["iteration"]) for record in self.records), default=0)

    @property
    def num_processes(self) -> int | None:
        """Of the newest start."""
        return self.starts[-1].num_processes if self.starts else None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Iterations and values of one figure, where it was logged, ascending."""
        values = {int(record["iteration"]): record[name] for record in self.records if name in record}
        return sorted(values), [values[iteration] for iteration in sorted(values)]

    def names(self, pattern: str) -> list[str]:
        """Figures whose whole names match, in the order in which they first came."""
        known = dict.fromkeys(name for record in self.records for name in record)
        return [name for name in known if re.fullmatch(pattern, name)]


def read_run(folder: Path) -> Run:
    """
    Raises:
        UserError: the folder is not a run's, or a file of it cannot be read; the message names it.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not (config.is_file() or metrics.is_file()):
        raise ReportError(f"{folder}: not a run's folder: neither config.yaml nor metrics.jsonl is in it")
    try:
        steps = whole_checkpoints(folder)
        whole = {path.name for path in steps.values()}
        return Run(
            folder,
            read_records(folder) if metrics.exists() and metrics.stat().st_size else [],
            _count_lines(folder / "metrics.jsonl.lost"),
            load_config(config) if config.exists() else None,
            config.read_text(encoding="utf-8") if config.exists() else "",
            _read_starts(folder),
            read_object(folder / "heartbeat.json"),
            [_read_checkpoint(iteration, path) for iteration, path in sorted(steps.items())],
            sorted(of.name for of in (folder / "checkpoints").glob("*step_*") if of.is_dir() and of.name not in whole),
        )
    except OSError as error:
        raise ReportError(f"{error.filename}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """
    Raises:
        ReportError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file that may be missing: then it is empty.

    Raises:
        ReportError: it is no JSON object.
    """
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ReportError(f"{path}: not a JSON object")
    return content


def _read_starts(folder: Path) -> list[Start]:
    folders = {int(path.name): path for path in (folder / "attempts").glob("*") if path.name.isdecimal()}
    return [
        Start(
            number,
            read_object(path / "environment.json"),
            read_object(path / "outcome.json"),
            [read_object(fault) for fault in sorted(path.glob("fault_*.json"))],
            _count_lines(path / SPOILT_BATCHES),
        )
        for number, path in sorted(folders.items())
    ]


def _read_checkpoint(iteration: int, folder: Path) -> Checkpoint:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Checkpoint(iteration, num_bytes, read_object(folder / FORMAT_FILE))


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
