"""What rounds of serving say: measures for the file, tables for people."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from bench_report import Measure, measure_of
from bench_serve_rounds import Figures, Rounds
from bench_serve_setup import FULL, POLICIES, STRATEGIES, Setting

from megatron_ee.inference.scheduling.report import as_json
from megatron_ee.inference.scheduling.report_table import table

GOAL_OVER_LOCKSTEP = 0.99
GOAL_OF_BOUND = 0.9
"""Where there are enough sequences to fill launches; where there are not, of what the simulator's best makes."""


def measures_of(rounds: Rounds) -> Iterator[Measure]:
    """Of requests that come one by one, what they wait is all that is of interest."""
    for setting, figures in rounds.figures.items():
        if setting == FULL:
            continue
        name = f"{setting.name}_{rounds.sizes.name}"
        context = _context(rounds, figures)
        if rounds.sizes.load is not None:
            lockstep = rounds.figures[Setting("lockstep", setting.policy)]
            pairs = zip(figures, lockstep, strict=True)
            values = [_request(own) / _request(other) for own, other in pairs]
            yield _measure(f"serve_request_p95_over_lockstep_{name}", values, figures, context, better="lower")
            continue
        for what, of, goal in _ratios(setting, fills_launches=rounds.sizes.residents > rounds.sizes.launch_rows):
            yield _measure(f"serve_{what}_{name}", [of(each) for each in figures], figures, context, goal=goal)


def tables(rounds: Rounds) -> Iterator[str]:
    """Lines."""
    sizes = rounds.sizes
    coming = "all at once" if sizes.load is None else f"one by one, {sizes.load:.0%} of lockstep's room"
    yield f"{sizes.requests} requests {coming}; {sizes.residents} at a time, {sizes.launch_rows} tokens a launch"
    if sizes.load is None:
        yield from _speeds(rounds)
    for policy in POLICIES:
        yield ""
        yield f"{policy}, the last round"
        yield from table({name: rounds.figures[Setting(name, policy)][-1].report for name in STRATEGIES})
    if rounds.compared:
        yield ""
        yield (
            f"beside {rounds.compared} texts decoded alone: {rounds.other_depths} tokens left elsewhere, "
            f"{rounds.rounding} texts differ by rounding"
        )


def _speeds(rounds: Rounds) -> Iterator[str]:
    full = [figures.tokens_per_second / figures.over_full for of in rounds.figures.values() for figures in of]
    yield f"full depth {statistics.median(full):.0f} tokens/s"
    yield (
        f"{'strategy, missing KV':<22}{'tokens/s':>9}{'/lockstep':>11}{'p10':>7}{'p90':>7}{'A/A':>7}{'/full':>7}"
        f"{'of bound':>10}{'of best':>9}{'simulated':>11}{'beside':>8}{'a step':>9}{'a token':>9}{'forced':>8}"
    )
    for setting, figures in rounds.figures.items():
        if setting == FULL:
            continue
        over = measure_of("", [of.over_lockstep for of in figures], "higher", 1.0, {})

        def median(of: Callable[[Figures], float], figures: Sequence[Figures] = figures) -> float:
            return statistics.median(map(of, figures))

        yield (
            f"{setting.strategy + ' ' + (setting.policy or ''):<22}{median(lambda of: of.tokens_per_second):>9.0f}"
            f"{over.value:>10.3f}x{over.spread[0]:>7.3f}{over.spread[1]:>7.3f}{median(lambda of: of.aa):>7.3f}"
            f"{median(lambda of: of.over_full):>6.2f}x{median(lambda of: of.of_bound):>10.2f}"
            f"{median(lambda of: of.of_best):>9.2f}{median(lambda of: of.simulated):>11.3f}"
            f"{median(lambda of: of.beside):>8.0%}{median(lambda of: of.step) * 1e6:>6.0f} us"
            f"{median(lambda of: of.token) * 1e6:>6.0f} us{sum(of.forced for of in figures):>8}"
        )


def _ratios(
    setting: Setting, *, fills_launches: bool
) -> Iterator[tuple[str, Callable[[Figures], float], float | None]]:
    rebatches = setting.strategy == "rebatch"
    if setting.strategy != "lockstep":
        yield "over_lockstep", lambda of: of.over_lockstep, GOAL_OVER_LOCKSTEP
    yield "over_full", lambda of: of.over_full, None
    yield "of_bound", lambda of: of.of_bound, GOAL_OF_BOUND if rebatches and fills_launches else None
    yield "of_best", lambda of: of.of_best, GOAL_OF_BOUND if rebatches and not fills_launches else None
    yield "simulated", lambda of: of.simulated, None


def _measure(
    name: str, values: list[float], figures: Sequence[Figures], context: dict[str, Any], **more: Any
) -> Measure:
    aa = statistics.median(of.aa for of in figures)
    return measure_of(name, values, more.pop("better", "higher"), aa, context, **more)


def _request(figures: Figures) -> float:
    waited = figures.report.request.p95
    assert waited is not None, "every request says something"
    return waited


def _context(rounds: Rounds, figures: Sequence[Figures]) -> dict[str, Any]:
    """Forced exits are of all rounds; what was waited, and slots, are of the last one."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sizes": asdict(rounds.sizes),
        "tokens_per_cpu_second": statistics.median(of.tokens_per_second for of in figures),
        "tokens_by_exit": figures[-1].depths,
        "share_beside_launches": statistics.median(of.beside for of in figures),
        "share_planning": statistics.median(of.planning for of in figures),
        "seconds_a_step": statistics.median(of.step for of in figures),
        "seconds_a_token": statistics.median(of.token for of in figures),
        "forced": sum(of.forced for of in figures),
        "texts_compared_with_alone": rounds.compared,
        "other_depths_than_alone": rounds.other_depths,
        "other_by_rounding": rounds.rounding,
        "report": as_json(figures[-1].report),
    }
