"""Draws an evaluation: of each text and task, its first figure against the mean depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from evaluate_results import Cell, subjects_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_losses import STYLE, WITHOUT_DATE

_PANEL = (5.2, 4.2)  # inches
_COLUMNS = 3
_KINDS: dict[str, dict[str, Any]] = {
    "exit": {"color": "#999999", "marker": "s", "linestyle": "", "label": "all tokens at one exit"},
    "threshold": {"color": "#0072b2", "marker": "o", "linestyle": "-", "linewidth": 1.8, "label": "early exit"},
    "full": {"color": "#d55e00", "marker": "D", "linestyle": "", "label": "full depth"},
    "sled": {"color": "#009e73", "marker": "^", "linestyle": "", "label": "sled"},
    "dola": {"color": "#cc79a7", "marker": "v", "linestyle": "", "label": "dola"},
}


def save_picture(output: Path, cells: Sequence[Cell], *, title: str) -> bool:
    """Write a picture; the same figures give the same bytes. Returns whether there was something to draw."""
    subjects = {name: own for name, own in subjects_of(cells).items() if any(_point(cell) for cell in own)}
    if not subjects:
        return False
    columns = min(_COLUMNS, len(subjects))
    rows = -(-len(subjects) // columns)
    with mpl.rc_context(STYLE):
        size = (_PANEL[0] * columns, _PANEL[1] * rows + 0.4)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, ((_, subject), own) in zip(panels, subjects.items(), strict=False):
            draw(axes, subject, own)
        for axes in panels[len(subjects) :]:
            axes.set_axis_off()
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata=WITHOUT_DATE[output.suffix])
    return True


def draw(axes: Axes, subject: str, cells: Sequence[Cell]) -> None:
    """One subject: a point for each mode, thresholds joined by a line."""
    names = list(dict.fromkeys(next(iter(cell.figures)) for cell in cells if _point(cell)))
    for kind, style in _KINDS.items():
        own = [cell for cell in cells if cell.mode.split(" ")[0] == kind and _point(cell)]
        points = sorted((*_drawn(cell, names[0]), cell.mode) for cell in own if names[0] in cell.figures)
        if points:
            depths, values = [point[0] for point in points], [point[1] for point in points]
            axes.plot(depths, values, markersize=5.5, markeredgecolor="white", **style)
            for depth, value, mode in points if kind == "threshold" else ():
                axes.annotate(
                    mode.removeprefix("threshold "),
                    (depth, value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=style["color"],
                )
    axes.set_title(subject, loc="left")
    axes.set_xlabel("mean depth (layers)")
    axes.set_ylabel("loss (nats per token)" if names[0] == "loss" else names[0])
    axes.set_axisbelow(True)
    axes.legend(loc="best")


def _point(cell: Cell) -> bool:
    return cell.mean_depth is not None and bool(cell.figures)


def _drawn(cell: Cell, name: str) -> tuple[float, float]:
    assert cell.mean_depth is not None
    return cell.mean_depth, cell.figures[name]
