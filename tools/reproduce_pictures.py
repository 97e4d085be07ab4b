"""The pictures of docs/results.md."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import reproduce_measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_losses import STYLE, WITHOUT_DATE
from reproduce_page import LAYERSKIP, ON_A_FINISHED_MODEL
from reproduce_results import Results

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
    for name, (drawn, draw) in PICTURES.items():
        if drawn not in results.content:
            continue
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


def _measures(results: Results, axes: Axes) -> None:
    for name, curve in results.content["measures"]["curves"].items():
        axes.plot(curve["mean_depth"], curve["agreement"], label=name.replace("_", " "), linewidth=1.3)
    axes.set(xlabel=f"mean depth, {DEPTH}", ylabel="agreement with full depth")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _speculation(results: Results, axes: Axes) -> None:
    """Measured speed by length, a line an exit; the law as dots."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for exit, length, *_, speed, law, _ in reproduce_measured.speculation_rows(results.content["decode"], 1):
        if length.isdecimal():
            points.setdefault(exit, []).append((int(length), float(speed.split()[0]), float(law)))
    for exit, of_exit in points.items():
        lengths, speeds, laws = zip(*of_exit, strict=True)
        (line,) = axes.plot(lengths, speeds, "o-", label=f"exit {exit} drafts", markersize=4)
        axes.plot(lengths, laws, "_", color=line.get_color(), markersize=12)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set(xlabel="tokens a draft", ylabel="speed over full depth (dash: the law)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _serving(results: Results, axes: Axes) -> None:
    """Tokens per second over full depth, a group a load and policy."""
    speeds = {
        (strategy, residents, policy): float(over_full.split()[0])
        for residents in reproduce_measured.residents(results.content["serve"])
        for strategy, policy, over_full, *_ in reproduce_measured.serving_rows(results.content["serve"], residents)
    }
    groups = list(dict.fromkeys((residents, policy) for _, residents, policy in speeds))
    for number, strategy in enumerate(dict.fromkeys(strategy for strategy, *_ in speeds)):
        own = {(residents, policy): speed for (name, residents, policy), speed in speeds.items() if name == strategy}
        places = [place + 0.27 * (number - 1) for place in range(len(groups))]
        axes.bar(places, [own.get(group, 0.0) for group in groups], 0.25, label=strategy)
    axes.set_xticks(
        range(len(groups)), [f"{residents} at a time\n{policy}" for residents, policy in groups], fontsize=8
    )
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set(ylabel="tokens/s over full depth", ylim=(0.0, 1.2))
    axes.set_axisbelow(True)  # the grid
    axes.legend(fontsize=8, ncols=3, loc="upper right")


def _sled(results: Results, axes: Axes) -> None:
    """Difference in accuracy by alpha, a line a scale, on code."""
    cells = results.content["sled_code"]["cells"]
    for top_k in dict.fromkeys(cell["top_k"] for cell in cells):
        own = [cell for cell in cells if cell["top_k"] == top_k]
        values, errors = ([100 * cell[name] for cell in own] for name in ("difference", "standard_error"))
        axes.errorbar([cell["alpha"] for cell in own], values, yerr=errors, fmt="o-", label=f"k {top_k}", markersize=4)
    axes.set_xscale("log")
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set(xlabel="alpha", ylabel="next tokens right, points over full depth")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


PICTURES: Mapping[str, tuple[str, Callable[[Results, Axes], None]]] = {
    "exits": ("runs", _exits),
    "heads": ("costs", _heads),
    "layerskip": ("runs", _layerskip),
    "tuned": ("runs", _tuned),
    "measures": ("measures", _measures),
    "speculation": ("decode", _speculation),
    "serving": ("serve", _serving),
    "sled": ("sled_code", _sled),
}
"""By name: the file that it draws, and how."""
