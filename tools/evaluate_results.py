"""What an evaluation has found so far, in a file that grows by every figure, and as tables. Imports no torch."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ee.errors import FieldError, UserError

VERSION = 1  # of the file

_PERCENT = ("accuracy", "agreement")
_LARGE = 1e5  # digits beyond these say nothing
_ORDER = ("exit", "threshold", "full", "speculative", "sled", "dola")


@dataclass(frozen=True, slots=True)
class Cell:
    """A text or a task, by one mode.

    Attributes:
        subject: the text's or the task's name.
        mode: or an exit's name, where all tokens leave there.
        figures: by name, in the order of the table.
        mean_depth: layers run for a token; None: nobody said.
        depths: number of layers run -> tokens.
        errors: standard errors, of figures that have one.
        requests: of a task, how many of each kind.
        note: what a reader has to know.
    """

    kind: Literal["text", "task"]
    subject: str
    mode: str
    figures: Mapping[str, float]
    mean_depth: float | None = None
    depths: Mapping[int, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    requests: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all figures of a file have in common.

    Attributes:
        checkpoint: its path, for people.
        hash: says which checkpoint it is.
        model: of exits and tokenizer, what a config may say beside the checkpoint.
        exit: `inference.exit`, but for mode and threshold.
        server: the address that tasks were asked at; None: in process.
    """

    checkpoint: str
    hash: str
    model: Mapping[str, Any]
    exit: Mapping[str, Any]
    server: str | None = None

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """In words, what makes figures no neighbours."""
        named = {"hash": "checkpoint", "model": "exits or tokenizer", "exit": "inference.exit", "server": "--server"}
        mine = json.loads(json.dumps(asdict(self)))
        return [name for key, name in named.items() if mine[key] != other.get(key)]


class Results:
    """The file. Each cell is on the disk once it is kept.

    Args:
        subjects: name -> what says that it is the very same text, or the same questions.
        again: begin anew, whatever is in the file.

    Raises:
        FieldError: the file's figures are of another checkpoint, or were measured otherwise.
        UserError: it is damaged.
    """

    def __init__(self, path: Path, setting: Setting, subjects: Mapping[str, str], *, again: bool = False) -> None:
        self.path, self.setting = path, setting
        self.cells: dict[tuple[str, str, str], Cell] = {}
        self._subjects = dict(subjects)
        if path.exists() and not again:
            self._take(_read(path))

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self.cells

    def keep(self, cells: Iterable[Cell]) -> None:
        """
        Raises:
            UserError: the file cannot be written.
        """
        self.cells |= {(cell.kind, cell.subject, cell.mode): cell for cell in cells}
        content = {
            "version": VERSION,
            "setting": asdict(self.setting),
            "subjects": self._subjects,
            "cells": [asdict(cell) for cell in self.cells.values()],
        }
        write_whole(self.path, json.dumps(content, indent=1) + "\n")

    def ordered(self) -> list[Cell]:
        """All of them: subjects as they came, of each the exits, then modes, thresholds ascending."""
        subjects = list(subjects_of(self.cells.values()))
        return sorted(self.cells.values(), key=lambda cell: (subjects.index((cell.kind, cell.subject)), _place(cell)))

    def _take(self, content: Mapping[str, Any]) -> None:
        try:
            others = self.setting.differences(content["setting"])
            subjects, cells = content["subjects"], [_cell(of) for of in content["cells"]]
            sorted(map(_place, cells))  # every name is known
            others += [name for name, digest in self._subjects.items() if subjects.get(name, digest) != digest]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path} is damaged ({error!r}); --again begins anew") from error
        if others:
            raise FieldError(
                "--output",
                f"{self.path} has figures that were measured otherwise ({', '.join(others)}): name another folder, or "
                "begin anew with --again",
            )
        self._subjects = {**subjects, **self._subjects}
        self.cells = {(cell.kind, cell.subject, cell.mode): cell for cell in cells}


def write_whole(path: Path, text: str) -> None:
    """So that the file is whole or as it was.

    Raises:
        UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def figures_of(results: Mapping[str, Mapping[str, Any]], name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Of a task of lm-evaluation-harness, and their standard errors; of what has no figures of its own, those of its
    parts."""
    parts = {"": results[name]} if name in results else {f"{part} ": of for part, of in results.items()}
    figures: dict[str, float] = {}
    errors: dict[str, float] = {}
    for prefix, of in parts.items():
        for key, value in of.items():
            metric, comma, way = key.partition(",")
            if not comma or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            into = errors if metric.endswith("_stderr") else figures
            title = prefix + metric.removesuffix("_stderr") + ("" if way == "none" else f" ({way})")
            into[title] = float(value)
    return figures, errors


def tables(cells: Sequence[Cell]) -> list[str]:
    """Lines for a console: of each subject, a row for each mode."""
    lines = []
    for title, columns, rows in _tables(cells):
        widths = [max(len(row[number]) for row in (columns, *rows)) + 2 for number in range(len(columns))]
        for row in (columns, *rows):
            first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
            lines.append((first.strip().ljust(widths[0]) + "".join(others)).rstrip())
        lines = [*lines[: -len(rows) - 1], title, *lines[-len(rows) - 1 :], ""]
    return [*lines[:-1], *_notes(cells)]


def markdown(title: str, cells: Sequence[Cell]) -> str:
    """The same as a page."""
    lines = [f"# {title}", ""]
    for heading, columns, rows in _tables(cells):
        lines += [f"## {heading}", "", _line(columns), _line(["---", *["--:"] * (len(columns) - 1)])]
        lines += [*map(_line, rows), ""]
    return "\n".join([*lines, *_notes(cells)]).rstrip() + "\n"


def text_of(name: str, value: float | None, error: float | None = None) -> str:
    """A figure, with its standard error, as people read it."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    spread = "" if error is None else f" ± {error:.4f}"
    if name in _PERCENT:
        return f"{value:.1%}"
    return f"{value:.4f}{spread}" if abs(value) < _LARGE else f"{value:.4g}{spread}"


def subjects_of(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Kind and name -> its cells, in their order."""
    subjects: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        subjects.setdefault((cell.kind, cell.subject), []).append(cell)
    return subjects


def _tables(cells: Sequence[Cell]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    for (kind, subject), own in subjects_of(cells).items():
        names = list(dict.fromkeys(name for cell in own for name in cell.figures))
        rows = [
            [cell.mode, "-" if cell.mean_depth is None else f"{cell.mean_depth:.2f}"]
            + [text_of(name, cell.figures.get(name), cell.errors.get(name)) for name in names]
            for cell in own
        ]
        yield f"{kind} {subject}", ["", "mean depth", *names], rows


def _place(cell: Cell) -> tuple[int, float]:
    name, _, number = cell.mode.partition(" ")
    return _ORDER.index(name), float(number or 0)


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(part.replace('|', '/') for part in parts)} |"


def _notes(cells: Iterable[Cell]) -> list[str]:
    notes = [f"{cell.subject}, {cell.mode}: {cell.note}" for cell in cells if cell.note]
    return ["", *notes] if notes else []


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); --again begins anew") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version {version!r}, not {VERSION}; --again begins anew")
    return content


def _cell(content: Mapping[str, Any]) -> Cell:
    return Cell(**{**content, "depths": {int(layer): count for layer, count in content["depths"].items()}})
