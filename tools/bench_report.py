"""What all benches share: taking turns, ratios of pairs with an A/A pair beside them, the table and the json."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the report.

    Attributes:
        goal: what the value is held against; None: it is only recorded.
        spread: the 10th and the 90th percentile over rounds.
        aa: the same measurement against itself; 1 without noise.
    """

    measure: str
    value: float
    goal: float | None
    better: Literal["lower", "higher"]
    spread: tuple[float, float]
    aa: float
    context: dict[str, Any]


class Rounds(NamedTuple):
    """Seconds of every round: A, B, and A again."""

    a: list[float]
    b: list[float]
    again: list[float]

    @property
    def paired(self) -> list[float]:
        """B over A of each round."""
        return [b / a for a, b in zip(self.a, self.b, strict=True)]

    @property
    def aa(self) -> float:
        return statistics.median(again / a for a, again in zip(self.a, self.again, strict=True))


def take_turns(rounds: int, a: Callable[[], float], b: Callable[[], float]) -> Rounds:
    """Run A, B, A in turns; the first round is dropped."""
    kept = Rounds([], [], [])
    for number in range(rounds):
        first, middle, last = a(), b(), a()
        if number % 2:  # what drifts, a clock that heats up, then counts once for and once against
            first, last = last, first
        if number:
            kept.a.append(first)
            kept.b.append(middle)
            kept.again.append(last)
    return kept


def all_take_turns(rounds: int, a: Callable[[int], float], others: list[Callable[[int], float]]) -> list[Rounds]:
    """Run A, each other one, and A again in turns, told the round's number; the first round is dropped."""
    kept = [Rounds([], [], []) for _ in others]
    for number in range(rounds):
        seconds = [run(number) for run in (a, *others, a)]
        if number % 2:
            seconds[0], seconds[-1] = seconds[-1], seconds[0]
        for of, other in zip(kept, seconds[1:-1], strict=True) if number else ():
            of.a.append(seconds[0])
            of.b.append(other)
            of.again.append(seconds[-1])
    return kept


def measure_of(
    name: str,
    values: list[float],
    better: Literal["lower", "higher"],
    aa: float,
    context: dict[str, Any],
    goal: float | None = None,
) -> Measure:
    """The median of the rounds, with its spread."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 2
    return Measure(name, statistics.median(values), goal, better, (cuts[0], cuts[-1]), aa, context)


def table(measures: list[Measure]) -> str:
    """The report as text."""
    width = max([33, *(len(measure.measure) for measure in measures)]) + 1
    lines = [f"{'':<{width}}{'value':>12}{'goal':>8}{'p10':>12}{'p90':>12}{'A/A':>8}"]
    for measure in measures:
        goal = "" if measure.goal is None else f"{measure.goal:g}"
        low, high = measure.spread
        lines.append(
            f"{measure.measure:<{width}}{measure.value:>12.5g}{goal:>8}{low:>12.5g}{high:>12.5g}{measure.aa:>8.3f}"
        )
    return "\n".join(lines)


def write(measures: list[Measure], path: Path) -> None:
    """As a list of objects, in the order of the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(measure) for measure in measures], indent=1) + "\n")
