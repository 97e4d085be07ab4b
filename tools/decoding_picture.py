"""Draws what the stages of a decoding pipeline did: a lane for each, in which launches are boxes."""

from pathlib import Path

import matplotlib as mpl
from decoding_lanes import UNITS, Lane, lanes_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from schedule_picture import STYLE, WITHOUT_DATE
from serving_picture import SHARES

from megatron_ee.errors import UserError
from megatron_ee.inference.decoding_record import Clock, DecodingRecord, Times

_HEIGHT = 0.84
_FEW_LAUNCHES = 400
"""Of a lane: boxes of more than that have no edges, which would hide them."""


def save_picture(output: Path, record: DecodingRecord, clock: Clock, window: Times | None) -> None:
    """Write a picture; the same record gives the same file, byte for byte.

    Raises:
        UserError: the name ends in neither .png nor .svg; or see `lanes_of`.
    """
    if output.suffix not in WITHOUT_DATE:
        raise UserError(f"--output: {output} must end in one of .txt, {', '.join(WITHOUT_DATE)}")
    (begin, end), lanes = lanes_of(record, clock, window)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.0, 0.42 * len(lanes) + 1.6), dpi=120, layout="constrained")
        axes = figure.subplots()
        for stage, lane in enumerate(lanes):
            _draw_lane(axes, stage, lane)
        names = [
            f"stage {stage}: layers {start + 1}-{stop}"
            for stage, (start, stop) in enumerate(zip((0, *record.stops), record.stops, strict=False))
        ]
        axes.set_yticks(range(len(lanes)), names)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlim(begin, end)
        axes.set_xlabel(f"time ({UNITS[clock]})")
        axes.tick_params(left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        shares = [
            f"{sum(getattr(lane, name) for lane in lanes) / len(lanes):.0%} {name}"
            for name in ("real", "filled", "idle")
        ]
        figure.suptitle(f"{len(lanes)} stages: {', '.join(shares)}", x=0.01, ha="left", fontweight="bold")
        handles = [Patch(facecolor=SHARES[name]) for name in ("real", "filled")]
        labels = ["rows of tokens on their way", "rows filled in"]
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata=WITHOUT_DATE[output.suffix])


def _draw_lane(axes: Axes, stage: int, lane: Lane) -> None:
    """The upper part of a box has the share of its rows that are filled in."""
    edge = 0.5 if len(lane.launches) <= _FEW_LAUNCHES else 0.0
    for launch, (begin, end) in lane.launches:
        filled = launch.filled / (launch.rows + launch.filled) * _HEIGHT
        for name, low, high in (("filled", 0.0, filled), ("real", filled, _HEIGHT)):
            if high > low:
                axes.broken_barh(
                    [(begin, end - begin)],
                    (stage - _HEIGHT / 2 + low, high - low),
                    facecolor=SHARES[name],
                    edgecolor="white",
                    linewidth=edge,
                )
    axes.text(
        1.005,
        stage,
        f"{lane.real:.0%} {lane.filled:.0%} {lane.idle:.0%}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
    )
