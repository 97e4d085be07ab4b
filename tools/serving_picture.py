"""Draws how a load was served: throughput against the slowest tokens, and how full launches were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from plot_losses import STYLE, WITHOUT_DATE

from megatron_ee.inference.scheduling.report import Report
from megatron_ee.inference.scheduling.report_table import Unit

Served = Mapping[int, Mapping[str, Report]]
"""Residents -> strategy -> what became of the load."""

# Told apart in any kind of colour blindness, and in grey: of Okabe and Ito's palette, with unlike brightness.
COLOURS = {"full depth": "#777777", "lockstep": "#d55e00", "compaction": "#56b4e9", "rebatch": "#00795a"}
SHARES = {"real": "#0072b2", "filled": "#f0c230", "empty": "#e9e9e9"}
MARKERS = "osD^vP"


def save_picture(output: Path, served: Served, *, unit: Unit, rate: str, title: str) -> None:
    """Write a picture, as .png; the same figures give the same file, byte for byte."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.8), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        waits, slots = figure.subplots(1, 2, width_ratios=(1, 1.35))
        draw_waits(waits, served, unit=unit, rate=rate)
        draw_slots(slots, served)
        metadata: dict[str, Any] = WITHOUT_DATE[".png"]
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata=metadata)


def draw_waits(axes: Axes, served: Served, *, unit: Unit, rate: str) -> None:
    """One point for each strategy and number of residents; a line joins those of a strategy."""
    names = list(dict.fromkeys(name for of in served.values() for name in of))
    for place, name in enumerate(names):
        thick = 1.0 + 1.4 * (len(names) - 1 - place)  # a later one that is as fast hides no earlier one
        points = [(of[name].token.p99, of[name].tokens_per_second, number) for number, of in served.items()]
        shown = [(slow * unit.factor, fast, number) for slow, fast, number in points if slow is not None]
        axes.plot([slow for slow, *_ in shown], [fast for _, fast, _ in shown], color=COLOURS[name], linewidth=thick)
        for slow, fast, number in shown:
            marker = MARKERS[list(served).index(number) % len(MARKERS)]
            axes.plot(
                slow, fast, marker=marker, markersize=7 + 2.5 * thick, color=COLOURS[name], markeredgecolor="white"
            )
    for name in names:
        axes.plot([], [], color=COLOURS[name], linewidth=3, label=name)
    for place, number in enumerate(served):
        marker = MARKERS[place % len(MARKERS)]
        axes.plot([], [], marker=marker, color="#444444", linestyle="", label=f"{number} residents")
    axes.set_xlabel(f"between tokens, 99th percentile ({unit.name})")
    axes.set_ylabel(rate)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * max([of.tokens_per_second for reports in served.values() for of in reports.values()]) or 1)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", fontsize=9)
    axes.set_title("upper left is better", loc="left", fontsize=10)


def draw_slots(axes: Axes, served: Served) -> None:
    """A bar for each segment of each strategy, and of a pipeline for the time of each stage; in groups by residents."""
    labels: list[str] = []
    places: list[float] = []
    bars: dict[str, list[float]] = {name: [] for name in SHARES}
    place = 0.0
    for number, reports in served.items():
        for name, report in reports.items():
            for (start, stop), use in report.use.items():
                places.append(place)
                labels.append(f"{name}, {number}: layers {start + 1} to {stop}")
                for kind, value in zip(SHARES, use.shares, strict=True):
                    bars[kind].append(value)
                place += 1.0
            for stage, of in enumerate(report.stages):
                places.append(place)
                labels.append(f"{name}, {number}: time of stage {stage}")
                for kind, value in zip(SHARES, of.shares, strict=True):
                    bars[kind].append(value)
                place += 1.0
            place += 0.4
    left: Sequence[float] = [0.0] * len(places)
    for kind, values in bars.items():
        axes.barh(places, values, left=left, color=SHARES[kind], label=kind, height=0.85)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_yticks(places, labels, fontsize=max(4.0, min(9.0, 200 / max(1, len(places)))))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False)
    has_stages = any(of.stages for reports in served.values() for of in reports.values())
    axes.set_title("slots of launches" + ", and stages" * has_stages, loc="left", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, fontsize=9, frameon=False)
