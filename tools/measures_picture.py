"""Draws what measures of confidence are worth: agreement against mean depth, and how reliable each exit's gate is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from exit_curves import Curve, Reliability
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_losses import STYLE, WITHOUT_DATE

COLOURS = {
    "max_probability": "#0072b2",
    "margin": "#56b4e9",
    "entropy": "#009e73",
    "cosine": "#cc79a7",
    "gate": "#d55e00",
}


def save_picture(output: Path, curves: Mapping[str, Curve], gates: Mapping[int, Reliability], *, title: str) -> None:
    """Write a picture; the same figures give the same bytes. Without gates it has one panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11 if gates else 6.5, 4.8), dpi=150, layout="constrained")
        panels = figure.subplots(1, 2 if gates else 1, squeeze=False)[0]
        _draw_curves(panels[0], curves, title)
        if gates:
            _draw_reliability(panels[1], gates)
        output.parent.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = WITHOUT_DATE[output.suffix]
        figure.savefig(output, metadata=metadata)


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], title: str) -> None:
    for name, curve in curves.items():
        axes.plot(curve.mean_depth, curve.agreement, color=COLOURS[name], linewidth=1.8, label=name)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("mean depth (layers)")
    axes.set_ylabel("agreement with full depth")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")


def _draw_reliability(axes: Axes, gates: Mapping[int, Reliability]) -> None:
    axes.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--", label="as sure as right")
    for number, (layer, of_gate) in enumerate(gates.items()):
        colour = mpl.colormaps["viridis_r"](0.15 + 0.85 * number / max(1, len(gates) - 1))
        label = f"exit {layer} (error {of_gate.error:.3f})"
        axes.plot(of_gate.confidence, of_gate.right, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set_title("gates, their cost taken out", loc="left", fontweight="bold")
    axes.set_xlabel("how sure the gate is")
    axes.set_ylabel("how often its exit is right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
