"""Draws timelines of a pipeline's step: a lane for each stage, a box for each F, X and B."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from megatron_ee.errors import UserError
from megatron_ee.parallel.pipeline.plan import Kind
from megatron_ee.parallel.pipeline.timeline import Span, Timeline

WITHOUT_DATE: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}
STYLE: dict[Any, Any] = {"font.size": 10, "hatch.linewidth": 0.7, "svg.hashsalt": "megatron_ee"}

# Told apart in any kind of colour blindness, and in grey: of Okabe and Ito's palette, with unlike brightness.
COLOURS = {Kind.F: "#56b4e9", Kind.X: "#f0c230", Kind.B: "#00795a", Kind.W: "#cc79a7"}
NAMES = {Kind.F: "forward", Kind.X: "exits", Kind.B: "backward", Kind.W: "weights"}
IDLE = "#e9e9e9"
FILL_HATCH = "////"

_MARGINS = 0.8  # inches beside the lanes, about
_FEW = 8  # stages: more get a wider picture
_MOST_NUMBERED = 16  # stages: above, lanes are too low for numbers
_POINTS = 72  # an inch
_DIGIT = 0.66  # of the font's size
_LARGEST, _SMALLEST = 8.5, 6.0  # numbers, in points


class Lanes(NamedTuple):
    """A group of lanes: what was recorded, or what was planned."""

    name: str
    timeline: Timeline


def save_picture(output: Path, groups: Sequence[Lanes], *, title: str, unit: str) -> None:
    """Write groups of lanes, above each other on one time axis. The same timelines give the same file, byte for byte.

    Args:
        unit: of time, for the axis.

    Raises:
        UserError: the name ends in neither .png nor .svg.
    """
    if output.suffix not in WITHOUT_DATE:
        raise UserError(f"--output: {output} must end in one of {', '.join(WITHOUT_DATE)}")
    with mpl.rc_context(STYLE):
        figure = draw_picture(groups, title=title, unit=unit)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata=WITHOUT_DATE[output.suffix])


def draw_picture(groups: Sequence[Lanes], *, title: str, unit: str) -> Figure:
    """See `save_picture`."""
    num_stages = len(groups[0].timeline.spans)
    lane_height = 0.36 if num_stages <= _FEW else 0.28 if num_stages <= _MOST_NUMBERED else 0.13
    width = 12.0 if num_stages <= _FEW else 18.0
    height = len(groups) * (num_stages * lane_height + 0.5) + 1.3
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    longest = max(group.timeline.makespan for group in groups)
    all_axes = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(all_axes, groups, strict=True):
        _draw_lanes(axes, group.timeline, longest)
        if len(groups) > 1:
            axes.set_title(f"{group.name}: {summary(group.timeline, unit)}", loc="left", fontsize=10)
        if num_stages <= _MOST_NUMBERED:
            _write_numbers(axes, group.timeline, lane_height, (width - _MARGINS) * _POINTS / longest)
    all_axes[-1].set_xlabel(f"time ({unit})")
    _draw_legend(figure, [group.timeline for group in groups])
    return figure


def _draw_lanes(axes: Axes, timeline: Timeline, longest: float) -> None:
    num_stages, num_chunks = len(timeline.spans), _num_chunks(timeline)
    boxes: defaultdict[tuple[int, Kind, int, bool], list[tuple[float, float]]] = defaultdict(list)
    for stage, lane in enumerate(timeline.spans):
        axes.broken_barh([(0, timeline.makespan)], (stage - 0.42, 0.84), facecolor=IDLE)
        for span in lane:
            place = stage, span.action.kind, span.action.chunk, _is_fill(timeline, span)
            boxes[place].append((span.start, span.end - span.start))
    line_width = 0.6 if num_stages <= _MOST_NUMBERED else 0.1
    for (stage, kind, chunk, is_fill), ranges in boxes.items():
        look: dict[str, Any] = {"facecolor": shade(kind, chunk, num_chunks), "edgecolor": "white"}
        look["hatch"] = FILL_HATCH if is_fill else None
        axes.broken_barh(ranges, (stage - 0.42, 0.84), linewidth=line_width, **look)
    every = 1 if num_stages <= _MOST_NUMBERED else 8
    axes.set_yticks(range(0, num_stages, every), [f"stage {stage}" for stage in range(0, num_stages, every)])
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_xlim(0, longest)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _write_numbers(axes: Axes, timeline: Timeline, lane_height: float, points_a_unit: float) -> None:
    """Each micro-batch's number in its boxes, where it fits."""
    num_chunks = _num_chunks(timeline)
    largest = min(_LARGEST, 0.6 * lane_height * _POINTS)
    for stage, lane in enumerate(timeline.spans):
        for span in lane:
            number = str(span.action.microbatch)
            width = (span.end - span.start) * points_a_unit
            size = min(largest, (width - 1.5) / (_DIGIT * len(number)))
            if size < _SMALLEST:
                continue
            colour = shade(span.action.kind, span.action.chunk, num_chunks)
            look: dict[str, Any] = {"color": _readable_on(colour), "fontsize": size}
            if _is_fill(timeline, span):  # the number stands on hatching
                look["path_effects"] = [withStroke(linewidth=2.5, foreground=colour)]
            axes.text((span.start + span.end) / 2, stage, number, ha="center", va="center_baseline", **look)


def summary(timeline: Timeline, unit: str) -> str:
    """What a title says of a timeline."""
    return f"bubble {timeline.bubble_fraction:.1%}, makespan {timeline.makespan:,.2f} {unit}"


def shade(kind: Kind, chunk: int, num_chunks: int) -> tuple[float, float, float]:
    """The colour of a kind of work: a stage's first chunk is the brightest, its last the plain colour."""
    red, green, blue = to_rgb(COLOURS[kind])
    white = 0.6 * (1 - chunk / (num_chunks - 1)) if num_chunks > 1 else 0.0
    return (red + white * (1 - red), green + white * (1 - green), blue + white * (1 - blue))


def _draw_legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    spans = [span for timeline in timelines for lane in timeline.spans for span in lane]
    kinds = {span.action.kind for span in spans}
    num_chunks = _num_chunks(timelines[0])
    handles: list[Any] = []
    labels = []
    for kind in (kind for kind in COLOURS if kind in kinds):
        handles.append(tuple(Patch(facecolor=shade(kind, chunk, num_chunks)) for chunk in range(num_chunks)))
        labels.append(f"{kind} {NAMES[kind]}" + (f", chunks 0 to {num_chunks - 1}" if num_chunks > 1 else ""))
    if any(_is_fill(timelines[0], span) for span in spans):
        handles.append(Patch(facecolor="#888888", edgecolor="white", hatch=FILL_HATCH))
        labels.append("F, X, B of a fill")
    figure.legend(
        [*handles, Patch(facecolor=IDLE)],
        [*labels, "idle"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=len(handles) + 1,
        frameon=False,
    )


def _num_chunks(timeline: Timeline) -> int:
    return 1 + max(span.action.chunk for lane in timeline.spans for span in lane)


def _is_fill(timeline: Timeline, span: Span) -> bool:
    return timeline.num_regular is not None and span.action.microbatch >= timeline.num_regular


def _readable_on(colour: tuple[float, float, float]) -> str:
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"
