"""Reads RUN/metrics.jsonl, the record that training keeps of its figures."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ee.config import load_config
from megatron_ee.errors import UserError


class MetricsError(UserError):
    """A run has no figures, or its file of figures cannot be read."""


class ExitLosses(NamedTuple):
    """One measurement.

    Attributes:
        losses: nats per token by exit layer, ascending; the last is the final output, if the run has it.
    """

    iteration: int
    losses: dict[int, float]


class Metrics(NamedTuple):
    """A run's measurements, by iteration."""

    training: list[ExitLosses]
    validation: list[ExitLosses]


Record = dict[str, float]
"""A line: `iteration`, and figures by their names."""


def read_metrics(run: Path) -> Metrics:
    """The losses of a run.

    Raises:
        MetricsError: see `read_records`.
    """
    return losses_of(read_records(run))


def losses_of(records: Sequence[Record]) -> Metrics:
    """What records say of losses."""
    return Metrics(_select(records, "train"), _select(records, "val"))


def read_records(run: Path) -> list[Record]:
    """All figures of a run, line by line.

    Each iteration is there once: a run that is resumed sets aside what it does again. Training and validation of an
    iteration are two lines. A last line without its end is still being written, and is left out.

    Raises:
        MetricsError: there is no such file, it is empty, or a line of it is not a record.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise MetricsError(f"{path}: {error.strerror}") from None
    if not lines:
        raise MetricsError(f"{path}: empty; has the run logged anything yet?")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def exit_names(layers: Sequence[int], run: Path) -> dict[int, str]:
    """What to call each exit of a run, given all of them, ascending. A run that trains exits alone has no final one."""
    config = run / "config.yaml"
    final = load_config(config).model.num_layers if config.exists() else layers[-1]
    return {layer: f"final ({layer} layers)" if layer == final else f"exit {layer}" for layer in layers}


def _parse(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        raise MetricsError(f"{place}: not a record of figures")
    if wrong := [name for name, value in record.items() if not _is_figure(value)]:
        raise MetricsError(f"{place}: not a record of figures: {wrong[0]} is no number")
    return record


def _is_figure(value: object) -> bool:
    """Whether a float can hold it, NaN among them."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _select(records: Sequence[Record], kind: str) -> list[ExitLosses]:
    newest = {}
    for record in records:
        matches = [(re.fullmatch(rf"{kind}/exit_(\d+)/loss", name), value) for name, value in record.items()]
        if losses := {int(match[1]): value for match, value in matches if match}:
            newest[int(record["iteration"])] = dict(sorted(losses.items()))
    return [ExitLosses(*item) for item in sorted(newest.items())]
