"""What a sweep found, and the files that it leaves: all cells as json, the best setting as YAML, and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ee.config import Config, ExitParams, to_yaml
from megatron_ee.config.dialect import to_text
from megatron_ee.errors import FieldError

# What a setting has to say of each mode, so that it is the same over any config that is otherwise default.
_FIELDS = {
    "full": (),
    "early_exit": ("measure", "threshold", "exits", "min_exit", "patience", "kv_policy", "max_pending"),
    "speculative": ("draft_exit", "draft_length", "draft_threshold", "exits", "min_exit", "max_pending"),
    "sled": ("sled",),
}


@dataclass(frozen=True)
class Panel:
    """One map of values, for the picture.

    Attributes:
        values: by row and column, the first row first; None: nothing was measured there.
        unit: format of a value, as in `{:.2f}x`.
        neutral: the value that is neither good nor bad; None: there is none.
        line: a contour is drawn between cells that reach this value and those that don't; None: none.
        best: row and column of the best setting; None: full depth is.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    row_title: str
    column_title: str
    unit: str
    neutral: float | None = None
    line: float | None = None
    best: tuple[int, int] | None = None
    lower_is_better: bool = False
    note: str = ""


@dataclass(frozen=True)
class Swept:
    """
    Attributes:
        lines: the table, and what it comes to.
        best: the setting to decode with; mode full where nothing is better.
        content: all figures, for the json.
    """

    lines: Sequence[str]
    best: ExitParams
    content: dict[str, Any]
    panels: Sequence[Panel] = field(default_factory=tuple)


class Files(NamedTuple):
    """Of one sweep in a folder."""

    json: Path
    fragment: Path
    base: Path
    picture: Path

    @classmethod
    def of(cls, folder: Path, sweep: str, kind: str) -> "Files":
        names = (f"{sweep}.json", f"{sweep}.yaml", f"{sweep}_base.yaml", f"{sweep}.{kind}")
        return cls(*(folder / name for name in names))


def fragment(best: ExitParams) -> str:
    """The section `inference`, as YAML."""
    said = best.model_dump(include={"mode", *_FIELDS[best.mode]})
    return to_text({"inference": {"exit": said}})


def write(files: Files, config: Config, swept: Swept) -> None:
    """Write all but the picture.

    `files.fragment` is a config: the best setting, over what all cells had in common, which is `files.base`.
    """
    common = config.inference.model_copy(update={"exit": ExitParams(), "thresholds_file": None})
    files.base.write_text(to_yaml(config.model_copy(update={"inference": common})), encoding="utf-8")
    files.fragment.write_text(f"base: {files.base.name}\n{fragment(swept.best)}", encoding="utf-8")
    content = {**swept.content, "best": swept.best.model_dump(include={"mode", *_FIELDS[swept.best.mode]})}
    files.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Before minutes are spent on what goes there.

    Raises:
        FieldError: nothing can be written to it.
    """
    attempt = folder / ".sweep.try"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attempt.touch()
        attempt.unlink()
    except OSError as error:
        raise FieldError("--output", f"{folder} cannot be written to: {error.strerror}") from error


def as_cells(cells: Sequence[Any]) -> list[dict[str, Any]]:
    """Of frozen dataclasses, for json."""
    return [asdict(cell) for cell in cells]
