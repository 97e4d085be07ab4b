"""Whether exits pay where many requests are served: chosen on one half of the prompts, judged on the other.

Of each token it is known what every exit would say, so every threshold is tried without decoding again. The interval is
a bootstrap's: prompts are drawn anew, and each such load is served by the best setting, by lockstep and at full depth.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from serving_costs import Machine
from serving_heard import Cell, Heard
from serving_runs import Setting, serve, serve_at_full_depth

from megatron_ee.config import ExitParams
from megatron_ee.config.dialect import to_text
from megatron_ee.inference.scheduling.simulate import SimulatedRequest

_ROUNDS = 3
"""So often every resident's place is taken in a load."""


class Gain(NamedTuple):
    """A ratio of throughputs, with the 90 % interval of a bootstrap over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Advice:
    """For one number of residents.

    Attributes:
        tried: threshold -> strategy -> throughput over full depth, of those that agree; on the prompts that choose.
        best: strategy and threshold; None: no threshold agrees often enough.
        over_full, over_lockstep: of the best, on the prompts that judge.
    """

    setting: Setting
    tried: Mapping[float, Mapping[str, float]]
    best: tuple[str, Cell] | None
    over_full: Gain | None
    over_lockstep: Gain | None

    @property
    def pays(self) -> bool:
        return self.over_full is not None and self.over_full.low > 1


class Loads:
    """Loads of prompts, over and over until there are enough requests.

    Args:
        times: arrivals of so many requests.
        enough: requests.
    """

    def __init__(self, texts: Sequence[Heard], times: Callable[[int], Sequence[float]], enough: int) -> None:
        self._texts, self._times, self._enough = texts, times, enough

    def of(self, cell: Cell, numbers: Sequence[int]) -> list[SimulatedRequest]:
        """Of these texts, in turns."""
        count = max(self._enough, len(numbers))
        return [
            SimulatedRequest(self._texts[which].prompt, cell.depths[which], time, cell.exits)
            for which, time in zip((numbers[at % len(numbers)] for at in range(count)), self._times(count), strict=True)
        ]


def advise(
    texts: Sequence[Heard],
    cells: Sequence[Cell],
    machine: Machine,
    setting: Setting,
    *,
    strategies: Sequence[str],
    times: Callable[[int], Sequence[float]],
    least_agreement: float,
    samples: int,
    seed: int,
) -> Advice:
    """
    Args:
        setting: its strategy is left to choose.
        times: arrivals of so many requests.
        samples: of the bootstrap.
    """
    loads = Loads(texts, times, _ROUNDS * setting.residents)
    numbers = random.Random(seed).sample(range(len(texts)), len(texts))
    choose, judge = numbers[::2], numbers[1::2]

    def speed(cell: Cell, strategy: str, of: Sequence[int]) -> float:
        return serve(loads.of(cell, of), machine, replace(setting, strategy=strategy)).tokens_per_second

    def full_speed(of: Sequence[int]) -> float:
        return serve_at_full_depth(loads.of(cells[0], of), machine, setting).tokens_per_second

    agreeing = {cell.threshold: cell for cell in cells if cell.agreement >= least_agreement}
    full = full_speed(choose)
    tried = {of: {name: speed(cell, name, choose) / full for name in strategies} for of, cell in agreeing.items()}
    if not tried:
        return Advice(setting, tried, None, None, None)
    _, strategy, threshold = max((gain, name, of) for of, gains in tried.items() for name, gain in gains.items())
    cell = agreeing[threshold]

    def ratios(of: Sequence[int]) -> tuple[float, float]:
        best = speed(cell, strategy, of)
        return best / full_speed(of), best / (best if strategy == "lockstep" else speed(cell, "lockstep", of))

    generator = random.Random(seed)
    drawn = [ratios(generator.choices(judge, k=len(judge))) for _ in range(samples)]
    gains = [_gain(value, sample) for value, sample in zip(ratios(judge), zip(*drawn, strict=True), strict=True)]
    return Advice(setting, tried, (strategy, cell), *gains)


def lines_of(advice: Advice, cells: Sequence[Cell], least_agreement: float) -> Iterator[str]:
    """What was tried, and what to do."""
    yield f"{advice.setting.residents} residents, {advice.setting.rows} rows a launch: throughput over full depth"
    names = list(next(iter(advice.tried.values()), ()))
    yield f"{'threshold':>9}{'agreement':>11}{'mean depth':>12}" + "".join(f"{name:>12}" for name in names)
    for cell in cells:
        gains = advice.tried.get(cell.threshold)
        shown = "  too low" if gains is None else "".join(f"{gain:>11.2f}x" for gain in gains.values())
        yield f"{cell.threshold:>9g}{cell.agreement:>11.1%}{cell.mean_depth:>12.2f}{shown}"
    yield verdict(advice, cells, least_agreement)


def verdict(advice: Advice, cells: Sequence[Cell], least_agreement: float) -> str:
    """One sentence."""
    if advice.best is None:
        closest = max(cells, key=lambda cell: cell.agreement)
        return (
            f"Do not switch it on: no threshold keeps {least_agreement:.1%} of full depth's tokens. The closest is "
            f"{closest.threshold:g}, with {closest.agreement:.1%}."
        )
    strategy, cell = advice.best
    best = f"{strategy} at threshold {cell.threshold:g}"
    if not advice.pays:
        return f"Do not switch it on: the best, {best}, is {advice.over_full} as fast as full depth."
    return (
        f"Best: {best}: {advice.over_full} as fast as full depth, {advice.over_lockstep} as lockstep, with "
        f"{cell.agreement:.1%} of full depth's tokens."
    )


def fragment(advice: Advice, params: ExitParams) -> str:
    """The section `inference`, as YAML."""
    if not advice.pays or advice.best is None:
        return to_text({"inference": {"exit": {"mode": "full"}}})
    strategy, cell = advice.best
    said: dict[str, Any] = {
        "max_batch_size": advice.setting.residents,
        "exit": {
            "mode": "early_exit",
            "measure": params.measure,
            "threshold": cell.threshold,
            "exits": params.exits,
            "min_exit": params.min_exit,
            "patience": params.patience,
            "kv_policy": advice.setting.kv_policy,
        },
        "scheduling": {**advice.setting.scheduling.model_dump(), "strategy": strategy},
    }
    return to_text({"inference": said})


def _gain(value: float, sample: Sequence[float]) -> Gain:
    cuts = statistics.quantiles(sample, n=20, method="inclusive")
    return Gain(value, cuts[0], cuts[-1])
