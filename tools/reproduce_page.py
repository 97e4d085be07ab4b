"""docs/results.md from the figures beside it: words are the template's, every number is a file's."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

LAYERSKIP = {
    "dropout_only": ("to 10 %", "none"),
    "loss_only": ("none", "rotational"),
    "loss_only_gradual": ("none", "gradual"),
    "layerskip": ("to 10 %", "rotational"),
    "layerskip_gradual": ("to 10 %", "gradual"),
    "dropout_30": ("linear to 30 %", "rotational"),
}
"""Config -> its dropout, and its exits' losses."""
WEIGHTS_AND_HEADS = {
    "every_second": "weights warm up over a quarter, as in all others",
    "constant_weights": "constant from the start",
    "long_warmup": "warm up over three quarters",
    "cool_down": "cool down from 1 to 0.1 over three quarters",
    "mlp_heads": "an MLP before each norm",
    "block_heads": "a layer before each norm",
    "own_projections": "a projection of each exit's own",
}
ON_A_FINISHED_MODEL = {
    "cold": "cold",
    "tuned_random": "tuned, from random",
    "tuned": "tuned, from copies",
    "every_second": "from the beginning, norms",
    "mlp_heads": "from the beginning, MLPs",
}

TEMPLATE = Path(__file__).parent / "reproduce_page.jinja"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of several seeds. In a table: the mean, and how far the seeds are from it at most."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def widest(self) -> float:
        return max(abs(value - self.mean) for value in self.values)

    def text(self, form: str) -> str:
        shown = format(self.mean, form)
        return shown if len(self.values) == 1 else f"{shown} ±{format(self.widest, form)}"


@dataclass(frozen=True)
class Results:
    """The figures of a folder.

    Attributes:
        content: file name without .json -> what it holds.
    """

    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        return cls({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))})

    @cached_property
    def by_config(self) -> dict[str, list[dict[str, Any]]]:
        """Config -> its runs, by seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in sorted(self.content["runs"]["runs"].values(), key=lambda run: (run["config"], run["seed"])):
            found.setdefault(run["config"], []).append(run)
        return found

    @property
    def machine(self) -> str:
        """Where the runs were trained; all on the same, or the figures say nothing of each other."""
        (place,) = {
            ", ".join([*(run["gpus"] or ["CPU"]), run["precision"], *(f"{k} {v}" for k, v in run["packages"].items())])
            for runs in self.by_config.values()
            for run in runs
        }
        return place

    def loss(self, config: str, layer: int) -> Spread:
        """Of the last validation, in nats per token."""
        return Spread(tuple(run["loss"][str(layer)] for run in self.by_config[config]))

    def difference(self, config: str, layer: int, other: str = "none", of_other: int | None = None) -> Spread:
        """In loss from another config's, seed by seed."""
        of_both = zip(self.by_config[config], self.by_config[other], strict=False)
        at = str(of_other or layer)
        return Spread(tuple(run["loss"][str(layer)] - base["loss"][at] for run, base in of_both))

    def acceptance(self, config: str, layer: int) -> Spread:
        """The share of drafted tokens that full depth accepts."""
        cells = [next(of for of in run["drafting"] if of["draft_exit"] == layer) for run in self.by_config[config]]
        return Spread(tuple(cell["acceptance"] for cell in cells))

    def end_of(self, config: str) -> Spread:
        """The loss at full depth, which exits on a finished model leave as it was."""
        return self.loss(config if "8" in self.by_config[config][0]["loss"] else "none", 8)

    def peak_gib(self, config: str) -> Spread:
        return Spread(tuple(run["peak_gib"] for run in self.by_config[config]))

    def layers(self, config: str) -> list[int]:
        """That were measured, ascending."""
        return [int(layer) for layer in self.by_config[config][0]["loss"]]

    def more_parameters(self, config: str) -> str:
        """Than a model without exits has; how weights change adds none."""
        steps = self.content["costs"]["steps"]
        return format(steps.get(config, steps["every_second"])["more_parameters"], ",")

    def cost(self, config: str) -> str:
        """A step's time over that of one without exits, where it was measured."""
        step = self.content["costs"]["steps"].get(config)
        return "" if step is None else f"{step['ratio']:.2f} [{step['low']:.2f}, {step['high']:.2f}]"


def page_of(results: Results) -> str:
    """The whole document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # markdown
    )
    environment.filters |= {"row": _row, "at": _at, "accepted": _accepted}
    return environment.get_template(TEMPLATE.name).render(
        results=results,
        layerskip=LAYERSKIP,
        weights_and_heads=WEIGHTS_AND_HEADS,
        on_a_finished_model=ON_A_FINISHED_MODEL,
        **results.content,
    )


def _row(cells: Iterable[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(_text, cells))} |"


def _text(cell: object) -> str:
    if isinstance(cell, Spread):
        return cell.text(".3f")
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return str(cell)


def _at(layer: int, results: Results, config: str) -> Spread:
    return results.loss(config, layer)


def _accepted(layer: int, results: Results, config: str) -> str:
    return results.acceptance(config, layer).text(".1%")
