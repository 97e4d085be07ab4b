"""Draws what a sweep measured: maps with a number in each cell, a contour between cells, a frame around the best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from schedule_picture import STYLE, WITHOUT_DATE
from sweep_results import Panel

from megatron_ee.errors import UserError

_CELL = (0.85, 0.5)  # inches


def save_picture(output: Path, panels: Sequence[Panel], *, title: str) -> None:
    """Write the panels side by side; the same figures give the same file, byte for byte.

    Raises:
        UserError: the name ends in neither .png nor .svg.
    """
    if output.suffix not in WITHOUT_DATE:
        raise UserError(f"{output}: the name must end in one of {', '.join(WITHOUT_DATE)}")
    rows = max(len(panel.rows) for panel in panels)
    width = sum(_CELL[0] * len(panel.columns) + 1.4 for panel in panels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(7.0, width), _CELL[1] * rows + 1.9), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, panel)
        figure.savefig(output, metadata=WITHOUT_DATE[output.suffix])


def draw(axes: Axes, panel: Panel) -> None:
    """One map, with the first row below."""
    values_RC = np.array([[np.nan if value is None else value for value in row] for row in panel.values], dtype=float)
    norm, colours = _scale(values_RC, panel.neutral)
    colours = colours.reversed() if panel.lower_is_better else colours
    axes.imshow(values_RC, cmap=colours, norm=norm, origin="lower", aspect="auto")
    for (row, column), value in np.ndenumerate(values_RC):
        text = "-" if np.isnan(value) else panel.unit.format(value)
        shade = colours(norm(value))
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=_readable_on(shade))
    if panel.line is not None:
        _draw_contour(axes, values_RC >= panel.line)
    if panel.best is not None:
        row, column = panel.best
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.5))
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.set_xlabel(panel.column_title)
    axes.set_ylabel(panel.row_title)
    axes.tick_params(length=0)
    dashed = "" if panel.line is None else f" (dashed: {panel.unit.format(panel.line)})"
    axes.set_title(f"{panel.title}{dashed}" + (f"\n{panel.note}" if panel.note else ""), loc="left", fontsize=10)


def _draw_contour(axes: Axes, above_RC: np.ndarray) -> None:
    """Between cells, so that it crosses no number."""
    style: dict[str, Any] = {"color": "black", "linewidth": 1.6, "linestyle": (0, (3, 1.5))}
    for row, column in zip(*np.nonzero(above_RC[1:] != above_RC[:-1]), strict=True):
        axes.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, **style)
    for row, column in zip(*np.nonzero(above_RC[:, 1:] != above_RC[:, :-1]), strict=True):
        axes.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], **style)


def _scale(values_RC: np.ndarray, neutral: float | None) -> tuple[Normalize, Colormap]:
    """Blue is good, and where there is a neutral value, it is white and red is bad. The darkest shades are left out."""
    low, high = float(np.nanmin(values_RC)), float(np.nanmax(values_RC))
    reach = 1.3 * max(high - low if neutral is None else max(high - neutral, neutral - low), 1e-9)
    if neutral is None:
        return Normalize(low, low + reach), mpl.colormaps["Blues"]
    return Normalize(neutral - reach, neutral + reach), mpl.colormaps["RdBu"]


def _readable_on(colour: Any) -> str:
    red, green, blue, _ = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"
