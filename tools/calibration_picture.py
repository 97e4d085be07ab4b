"""Draws a calibration: quality against depth and speed, where tokens leave, and who loses most."""

from typing import Any

import matplotlib as mpl
import numpy as np
from calibration import Calibrated
from calibration_runs import Measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_losses import STYLE

_SIZE = (9.6, 4.0)  # inches
_BLUE, _GREY = "#0072b2", "#777777"
_TARGETS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def curve(calibrated: Calibrated, risk: str) -> Figure:
    """Two panels with a shared axis of the risk: mean depth, and speed over full depth."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        full = calibrated.full.tokens_per_second
        _draw_curve(left, calibrated, [of.mean_depth for of in calibrated.measured], "mean depth (layers)")
        _draw_curve(
            right,
            calibrated,
            [of.tokens_per_second / full for of in calibrated.measured],
            "speed over full depth (one run each)",
        )
        left.set_ylabel(risk)
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
        if right.get_legend_handles_labels()[1]:
            right.legend(loc="upper left")
        return figure


def depths(calibrated: Calibrated) -> Figure:
    """A bar for each promise, and full depth's."""
    chosen = _chosen(calibrated)
    rows = [("full depth", calibrated.full), *((name, measured) for name, measured in chosen.items())]
    layers = sorted({layer for _, measured in rows for layer in measured.depths})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_SIZE[0], 1.3 + 0.5 * len(rows)), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        left_R = np.zeros(len(rows))
        for number, layer in enumerate(layers):
            shares_R = np.array([measured.depths.get(layer, 0) / measured.tokens for _, measured in rows])
            colour = mpl.colormaps["viridis_r"](0.1 + 0.85 * number / max(1, len(layers) - 1))
            axes.barh(range(len(rows)), shares_R, left=left_R, color=colour, label=f"after {layer}", height=0.7)
            left_R += shares_R
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("tokens")
        axes.grid(visible=False)
        figure.legend(loc="outside upper center", ncols=len(layers), title="layers run", frameon=False)
        return figure


def losses(calibrated: Calibrated, risk: str) -> Figure:
    """Every prompt's loss, sorted, with the worst tenth apart."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for number, (name, measured) in enumerate(_chosen(calibrated).items()):
            ordered_N = np.sort(measured.losses_N)
            shares_N = np.arange(1, len(ordered_N) + 1) / len(ordered_N)
            label = f"{name}: worst tenth {measured.worst_decile:.1%}"
            axes.plot(shares_N, ordered_N, color=_TARGETS[number % len(_TARGETS)], linewidth=1.8, label=label)
        axes.axvspan(0.9, 1.0, color="#f3f3f3", zorder=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("prompts, from the least to the most (the worst tenth is shaded)")
        axes.set_ylabel(risk)
        if axes.lines:
            axes.legend(loc="upper left")
        return figure


def _draw_curve(axes: Axes, calibrated: Calibrated, across: list[float], title: str) -> None:
    axes.plot(across, [of.risk for of in calibrated.measured], color=_BLUE, marker="o", markersize=4, linewidth=1.5)
    for number, promise in enumerate(calibrated.promises):
        colour = _TARGETS[number % len(_TARGETS)]
        axes.axhline(promise.target, color=colour, linewidth=1, linestyle="--")
        if promise.chosen is not None:
            at = calibrated.measured.index(promise.chosen)
            style: dict[str, Any] = {
                "marker": "o",
                "markersize": 9,
                "markerfacecolor": "none",
                "markeredgewidth": 2,
                "linestyle": "",
            }
            label = f"target {promise.target:.1%}"
            axes.plot([across[at]], [promise.chosen.risk], color=colour, label=label, **style)
    axes.set_xlabel(title)
    axes.set_ylim(bottom=0)
    axes.set_axisbelow(True)


def _chosen(calibrated: Calibrated) -> dict[str, Measured]:
    return {
        f"target {promise.target:.1%}": promise.chosen for promise in calibrated.promises if promise.chosen is not None
    }
