"""The pictures of a run's report, put into its page. Needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import plot_losses
import schedule_picture
from html_page import HtmlPage
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from report_measured import Goal
from report_run import Run
from schedule_picture import Lanes, summary

PHASES = {
    "forward": "#56b4e9",
    "exits": "#f0c230",
    "backward": "#00795a",
    "weights": "#cc79a7",
    "forward_backward": "#00795a",
    "optimizer": "#0072b2",
    "grad_sync": "#d55e00",
    "data": "#8c6d31",
    "prepare": "#b9a37e",
    "p2p_wait": "#d0d0d0",
    "rank_wait": "#a0a0a0",
}
"""Of a step; the colours of work are those of `schedule_picture`."""

_WIDTH = 8.0  # inches, as `plot_losses` draws
_WEIGHTS, _PHASES, _LOW = 2.0, 2.6, 1.6  # heights of panels
_LABEL = 0.19  # of a label
_LINE = "#0072b2"
_MOST_LABELLED = 8  # lines: of more, every so many has a label


def add_losses(page: HtmlPage, run: Run) -> None:
    """Of every exit, in training and validation."""
    with mpl.rc_context(plot_losses.STYLE):
        figure = plot_losses.draw(run.losses, run.folder)
        points = " Points: validation." if run.losses.validation else ""
        caption = f"Lines: training losses, means since the record before.{points}"
        page.picture(figure, alt="Loss of each exit over iterations, in nats per token", caption=caption)


def add_settings(page: HtmlPage, run: Run) -> None:
    """What training was steered by, and how large gradients were: weights of exits, learning rate, gradient norm."""
    weights = {name: run.series(name) for name in run.names(r"train/exit_\d+/weight")}
    lines = {
        "learning rate": run.series("train/lr"),
        "gradient norm": run.series("train/grad_norm"),
        "loss scale": run.series("train/loss_scale"),
    }
    shown = {name: of for name, of in lines.items() if of[0] and (name != "loss scale" or len({*of[1]}) > 1)}
    if not (weights or shown):
        return
    with mpl.rc_context(plot_losses.STYLE):
        figure, panels = _panels([_WEIGHTS] * bool(weights) + [_LOW] * len(shown), run.last_iteration)
        if weights:
            _draw_weights(panels[0], weights, run)
        for axes, (name, of) in zip(panels[bool(weights) :], shown.items(), strict=True):
            axes.plot(*of, color=_LINE, linewidth=1.3, **_marked(of[0]))
            axes.set_ylabel(name)
            if name == "gradient norm":
                axes.set_ylim(bottom=0)
        names = ["loss weights"] * bool(weights) + [*shown]
        page.picture(figure, alt=f"{', '.join(names)} over iterations")


def add_speed(page: HtmlPage, run: Run) -> None:
    """Tokens per second, where the time of a step went, and the pipeline's idle time."""
    speed = run.series("perf/tokens_per_s")
    idle = run.series("pipeline/bubble_fraction")
    planned = run.series("pipeline/planned_bubble_fraction")
    iterations, phases = phases_of(run)
    heights = [_LOW] * bool(speed[0]) + [_PHASES] * (len(iterations) > 1) + [_LOW] * bool(idle[0])
    if not heights:
        return
    with mpl.rc_context(plot_losses.STYLE):
        figure, panels = _panels(heights, run.last_iteration)
        left = iter(panels)
        if speed[0]:
            axes = next(left)
            axes.plot(*speed, color=_LINE, linewidth=1.3, **_marked(speed[0]))
            axes.set_ylabel("tokens/s")
            axes.set_ylim(bottom=0)
        if len(iterations) > 1:
            _draw_phases(next(left), iterations, phases)
        if idle[0]:
            _draw_idle(next(left), idle, planned)
        page.picture(figure, alt="Tokens per second, seconds of a step by phase, and idle time, over iterations")


def phases_of(run: Run) -> tuple[list[int], dict[str, list[float]]]:
    """Seconds of a step in each of PHASES, by iteration; 0 where none was logged. `checkpoint` is between steps."""
    held = {phase: run.series(f"time/{phase}_s") for phase in PHASES}
    iterations = sorted({iteration for of, _ in held.values() for iteration in of})
    found = {phase: dict(zip(*of, strict=True)) for phase, of in held.items() if of[0]}
    return iterations, {
        phase: [values.get(iteration, 0.0) for iteration in iterations] for phase, values in found.items()
    }


def add_plan(page: HtmlPage, groups: Sequence[Lanes], *, unit: str, caption: str) -> None:
    """A step's timeline; of several groups, one above the other."""
    with mpl.rc_context(schedule_picture.STYLE):
        first = groups[0].timeline
        title = f"{first.schedule}: {summary(first, unit)}" if len(groups) == 1 else first.schedule
        figure = schedule_picture.draw_picture(groups, title=title, unit=unit)
        alt = f"What {len(first.spans)} stages do over the time of a step: {', '.join(of.name for of in groups)}"
        page.picture(figure, alt=alt, caption=caption)


def add_depths(page: HtmlPage, counted: Sequence[tuple[str, Mapping[int, int]]]) -> None:
    """Where tokens came out: a panel for each file, a bar for each exit.

    Args:
        counted: of each file its name, and number of layers run -> tokens.
    """
    with mpl.rc_context(plot_losses.STYLE):
        rows = max(len(of) for _, of in counted)
        figure = Figure(figsize=(_WIDTH, len(counted) * (0.32 * rows + 0.5) + 0.4), dpi=150, layout="constrained")
        all_axes = figure.subplots(len(counted), sharex=True, squeeze=False)[:, 0]
        for axes, (name, of) in zip(all_axes, counted, strict=True):
            shares = [count / sum(of.values()) for count in of.values()]
            bars = axes.barh(range(len(of)), shares, color=_LINE, height=0.75)
            axes.bar_label(bars, [f"{value:.1%}" for value in shares], padding=4, fontsize=10)
            axes.set_yticks(range(len(of)), [f"{layer} layers" for layer in of])
            axes.set_xlim(0, 1.1)
            axes.set_title(name, loc="left", fontsize=11, parse_math=False)
            axes.grid(visible=False)
            axes.tick_params(left=False)
        all_axes[-1].xaxis.set_major_formatter(PercentFormatter(1.0))
        all_axes[-1].set_xticks([0, 0.25, 0.5, 0.75, 1])
        all_axes[-1].set_xlabel("share of tokens")
        page.picture(figure, alt="How many tokens came out after how many layers")


def add_goals(page: HtmlPage, goals: Sequence[Goal]) -> None:
    """How a bench stands to what it is held against: right of the line is better."""
    with mpl.rc_context(plot_losses.STYLE):
        figure = Figure(figsize=(_WIDTH, 0.3 * len(goals) + 1.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        for row, goal in enumerate(goals):
            colour = _LINE if goal.ratio >= 1 else "#d55e00"
            axes.plot([goal.low, goal.high], [row, row], color=colour, linewidth=1.5, alpha=0.5)
            axes.plot(goal.ratio, row, color=colour, **plot_losses.POINT)
        axes.axvline(1.0, color="#444444", linewidth=1)
        axes.set_yticks(range(len(goals)), [goal.measure for goal in goals], fontsize=9, parse_math=False)
        axes.set_ylim(len(goals) - 0.5, -0.5)
        axes.set_xlabel("times as good as its goal")
        axes.set_axisbelow(True)
        page.picture(figure, alt="Measures over their goals", caption="Points: medians; lines: from p10 to p90.")


def _draw_weights(axes: Axes, weights: Mapping[str, tuple[list[int], list[float]]], run: Run) -> None:
    labels = []
    for number, (name, (iterations, values)) in enumerate(weights.items()):
        colour = mpl.colormaps["viridis_r"](0.1 + 0.9 * number / max(1, len(weights) - 1))
        axes.plot(iterations, values, color=colour, linewidth=1.6, **_marked(iterations))
        layer = int(name.split("/")[1].removeprefix("exit_"))
        labels.append((values[-1], run.exit_names.get(layer, f"exit {layer}"), colour))
    axes.set_ylabel("loss weight")
    axes.set_ylim(bottom=0)
    _label_ends(axes, labels, inches=_WEIGHTS)


def _draw_phases(axes: Axes, iterations: Sequence[int], phases: Mapping[str, Sequence[float]]) -> None:
    axes.stackplot(iterations, *phases.values(), colors=[PHASES[phase] for phase in phases], edgecolor="white", lw=0.4)
    below, labels = 0.0, []
    whole = sum(values[-1] for values in phases.values())
    for phase, values in phases.items():
        if values[-1] >= 0.02 * whole:
            labels.append((below + values[-1] / 2, phase, PHASES[phase]))
        below += values[-1]
    axes.set_ylabel("seconds a step")
    axes.set_ylim(bottom=0)
    _label_ends(axes, labels, inches=_PHASES)


def _draw_idle(axes: Axes, idle: tuple[list[int], list[float]], planned: tuple[list[int], list[float]]) -> None:
    axes.plot(*idle, color="#d55e00", linewidth=1.3, **_marked(idle[0]))
    labels = [(idle[1][-1], "as it ran", "#d55e00")]
    if planned[0]:
        axes.plot(*planned, color="#777777", linewidth=1.3, linestyle="--", **_marked(planned[0]))
        labels.append((planned[1][-1], "its plan", "#777777"))
    axes.set_ylabel("pipeline idle")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    _label_ends(axes, labels, inches=_LOW)


def _panels(heights: Sequence[float], last_iteration: int) -> tuple[Figure, list[Axes]]:
    """Above each other, on one axis of iterations."""
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), dpi=150, layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes in panels:
        axes.set_axisbelow(True)
        axes.set_xlim(0, 1.01 * max(1, last_iteration))
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    return figure, list(panels)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, Any]], *, inches: float) -> None:
    """Names at the right of what they name, moved apart where they would cover each other."""
    wanted = sorted((label for label in labels if math.isfinite(label[0])), key=lambda label: label[0])
    every = max(1, math.ceil(len(wanted) / _MOST_LABELLED))
    wanted = wanted[::-1][::every][::-1]
    low, high = axes.get_ylim()
    apart = _LABEL / inches * (high - low)
    places: list[float] = []
    for value, _, _ in wanted:
        places.append(max(value, places[-1] + apart) if places else value)
    for number in reversed(range(len(places))):  # and down again from the top of the panel
        most = places[number + 1] - apart if number + 1 < len(places) else high
        places[number] = min(places[number], most)
    for (_, name, colour), place in zip(wanted, places, strict=True):
        transform = axes.get_yaxis_transform()
        ink = [0.65 * part for part in to_rgb(colour)]  # the lightest lines are too pale for letters
        axes.text(1.012, place, name, transform=transform, color=ink, va="center", fontsize=10)


def _marked(iterations: Sequence[int]) -> dict[str, Any]:
    """A line of few points shows them: of one there is no line."""
    return {"marker": "o", "markersize": 4} if len(iterations) < 8 else {}
