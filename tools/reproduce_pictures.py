"""The pictures of docs/results.md."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_losses import STYLE, WITHOUT_DATE
from reproduce_page import LAYERSKIP, ON_A_FINISHED_MODEL, Results

SIZE = (7.0, 4.0)  # inches
DEPTH = "layers"
LOSS = "loss, nats per token"

NAMES = {
    "none": "no exits",
    "quarter_and_half": "exits after 2, 4",
    "every_second": "exits after 2, 4, 6",
    "constant_weights": "constant weights",
    "long_warmup": "long warm-up",
    "cool_down": "cool-down",
    "mlp_heads": "MLP heads",
    "block_heads": "layer heads",
    "own_projections": "own projections",
    "dropout_only": "dropout, no exit loss",
    "loss_only": "rotational exit loss",
    "loss_only_gradual": "gradual exit loss",
    "layerskip": "dropout and rotational loss",
    "layerskip_gradual": "dropout and gradual loss",
    "dropout_30": "dropout to 30 %, rotational loss",
    "cold": "cold",
    "tuned": "tuned, from copies",
    "tuned_random": "tuned, from random",
}


def save_pictures(results: Results, folder: Path) -> None:
    """One a question, as PNG; the same figures give the same bytes."""
    for name, draw in PICTURES.items():
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=SIZE, dpi=110, layout="constrained")
            draw(results, figure.subplots())
            figure.savefig(folder / f"{name}.png", metadata=WITHOUT_DATE[".png"])


def _curves(results: Results, axes: Axes, configs: tuple[str, ...]) -> None:
    """Loss by depth: a line through the means, and a dot a seed."""
    for config in configs:
        layers = results.layers(config)
        spreads = [results.loss(config, layer) for layer in layers]
        (line,) = axes.plot(layers, [of.mean for of in spreads], label=NAMES[config], linewidth=1.2)
        for layer, of in zip(layers, spreads, strict=True):
            axes.plot([layer] * len(of.values), of.values, "o", color=line.get_color(), markersize=3.5)
    axes.set(xlabel=DEPTH, ylabel=LOSS)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _exits(results: Results, axes: Axes) -> None:
    _curves(results, axes, ("none", "quarter_and_half", "every_second"))


def _layerskip(results: Results, axes: Axes) -> None:
    _curves(results, axes, ("cold", *LAYERSKIP))


def _tuned(results: Results, axes: Axes) -> None:
    _curves(results, axes, tuple(ON_A_FINISHED_MODEL))


def _heads(results: Results, axes: Axes) -> None:
    """What a kind of head costs, and the loss that its exits have in the mean."""
    for config in ("every_second", "mlp_heads", "block_heads", "own_projections"):
        loss = sum(results.loss(config, layer).mean for layer in (2, 4, 6)) / 3
        step = results.content["costs"]["steps"][config]
        axes.errorbar(
            step["ratio"],
            loss,
            xerr=[[step["ratio"] - step["low"]], [step["high"] - step["ratio"]]],
            fmt="o",
            label=NAMES[config],
        )
    axes.set(xlabel="time of a step, over one without exits", ylabel=f"{LOSS}, mean of exits 2, 4, 6")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


PICTURES: Mapping[str, Callable[[Results, Axes], None]] = {
    "exits": _exits,
    "heads": _heads,
    "layerskip": _layerskip,
    "tuned": _tuned,
}
