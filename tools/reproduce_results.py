"""The figures of docs/results, as the page asks for them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from report_run import read_json

FILES = (
    "runs",
    "costs",
    "decode",
    "serve",
    "measures",
    "sled_code",
    "sled_books",
    "corrections_code",
    "corrections_books",
)


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
        return shown if len(self.values) == 1 else f"{shown} ±{format(self.widest, form.lstrip('+'))}"


@dataclass(frozen=True)
class Results:
    """The figures of a folder.

    Attributes:
        content: file name without .json -> what it holds.
    """

    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """
        Raises:
            ReportError: a file of it holds something else.
        """
        return cls({path.stem: read_json(path) for path in sorted(folder.glob("*.json"))})

    @property
    def is_complete(self) -> bool:
        """Whether all that the page says can be said."""
        return all(name in self.content for name in FILES)

    @cached_property
    def by_config(self) -> dict[str, list[dict[str, Any]]]:
        """Config -> its runs, by seed."""
        found: dict[str, list[dict[str, Any]]] = {}
        runs = self.content["runs"]["runs"].values() if "runs" in self.content else ()
        for run in sorted(runs, key=lambda run: (run["config"], run["seed"])):
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

    @property
    def minutes(self) -> float:
        """Of all runs' steps, where they were trained, one after another."""
        runs = (run for runs in self.by_config.values() for run in runs)
        return sum(float(run["iterations"] * run["seconds_per_iteration"]) for run in runs) / 60

    @property
    def cpu_hours(self) -> float:
        """Of all runs on two cores, by what a step of 1024 tokens takes on one; a run that was not timed as the one
        with exits after every second layer."""
        steps, seconds = self.content["costs"]["steps"], 0.0
        for config, runs in self.by_config.items():
            over = 1.0 if config == "none" else steps.get(config, steps["every_second"])["ratio"]
            seconds += sum(run["tokens"] for run in runs) / 1024 * self.content["costs"]["seconds"] * over
        return seconds / 2 / 3600

    def cost(self, config: str) -> str:
        """A step's time over that of one without exits, where it was measured."""
        step = self.content["costs"]["steps"].get(config)
        return "" if step is None else f"{step['ratio']:.2f} [{step['low']:.2f}, {step['high']:.2f}]"
