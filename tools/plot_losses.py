"""Draw a run's loss curves, a colour for each exit: plot_losses.py RUN

Reads RUN/metrics.jsonl and writes RUN/pictures/losses.png: training losses as thin lines, validation as points.
The same figures give the same picture, byte for byte.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from metrics_file import ExitLosses, Metrics, exit_names, read_metrics

from megatron_ee.errors import UserError

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.color": "#ebebeb",
    "legend.edgecolor": "white",
    "legend.framealpha": 1.0,
    "svg.hashsalt": "megatron_ee",
}
WITHOUT_DATE: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
POINT: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5.5, "markeredgecolor": "white"}


class Baseline(NamedTuple):
    """A loss to compare with."""

    nats: float
    name: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--baseline", type=float, metavar="NATS", help="draw a horizontal line at this loss")
    parser.add_argument("--baseline-name", default="baseline", metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .png, .svg or .pdf, instead of the run's own")
    arguments = parser.parse_args()
    baseline = None if arguments.baseline is None else Baseline(arguments.baseline, arguments.baseline_name)
    output = arguments.output or arguments.run / "pictures" / "losses.png"
    try:
        if output.suffix not in WITHOUT_DATE:
            raise UserError(f"{output}: the name must end in one of {', '.join(WITHOUT_DATE)}")
        metrics = read_metrics(arguments.run)
        if not metrics.training:
            raise UserError(f"{arguments.run / 'metrics.jsonl'}: holds no training record")
        with mpl.rc_context(STYLE):
            figure = draw(metrics, arguments.run, baseline=baseline)
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, metadata=WITHOUT_DATE[output.suffix])
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(output)
    return 0


def draw(metrics: Metrics, run: Path, *, baseline: Baseline | None = None) -> Figure:
    """A run's losses over iterations, from the shallowest exit (light) to the final output (dark)."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    layers = list(metrics.training[-1].losses)
    names = exit_names(layers, run)
    for number, layer in enumerate(layers):
        colour = mpl.colormaps["viridis_r"](0.1 + 0.9 * number / max(1, len(layers) - 1))
        axes.plot(*curve(metrics.training, layer), color=colour, linewidth=1.3, label=names[layer])
        axes.plot(*curve(metrics.validation, layer), color=colour, zorder=3, **POINT)
    if metrics.validation:
        axes.plot([], [], color="#777777", label="validation", **POINT)
    if baseline is not None:
        label = f"{baseline.name} ({baseline.nats:.2f})"
        axes.axhline(baseline.nats, color="#444444", linewidth=1, linestyle="--", zorder=1, label=label)
    _finish(axes, run.resolve().name)
    return figure


def curve(measurements: Sequence[ExitLosses], layer: int) -> tuple[list[int], list[float]]:
    """One exit's iterations and losses, where it was measured."""
    points = [(iteration, losses[layer]) for iteration, losses in measurements if layer in losses]
    return [iteration for iteration, _ in points], [loss for _, loss in points]


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    axes.legend(loc="upper right")


if __name__ == "__main__":
    sys.exit(main())
