"""Rounds of serving: each setting in turns, and what came of it beside the others of its round and the simulator."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bench_serve_bound import least_seconds, prompt_rates
from bench_serve_costs import recorded_costs, with_overhead
from bench_serve_record import RecordedBatch, Served, Stopwatch, serve, watched
from bench_serve_setup import FULL, POLICIES, STRATEGIES, Load, ServeSizes, Setting, settings_of_a_round

from megatron_ee.config import KvPolicy
from megatron_ee.inference.request import Emission
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.report import Report, report_of
from megatron_ee.inference.scheduling.simulate import EngineSimulator, SimulatedRequest
from megatron_ee.inference.scheduling.workload import arrivals

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel

ROUNDING = 1e-3
"""A confidence so near to the threshold may be on its other side with other rows in the launch."""


class Figures(NamedTuple):
    """Of one setting in one round. Ratios are of throughput.

    Attributes:
        over_lockstep, over_full: of the same round.
        aa: lockstep over lockstep, of the same policy.
        of_bound: while others wait, of what no strategy can do better.
        of_best: of the best strategy in the simulator, with launches alone.
        simulated: the simulator's seconds over those measured, with what this run spent beside launches.
        step, token: seconds beside launches, of each step and of each token.
        beside: their share of all.
        forced: tokens that left below their threshold.
    """

    over_lockstep: float
    over_full: float
    aa: float
    of_bound: float
    of_best: float
    simulated: float
    step: float
    token: float
    beside: float
    planning: float
    forced: int
    report: Report
    tokens_per_second: float
    depths: dict[int, int]


@dataclass
class Rounds:
    """
    Attributes:
        figures: of each setting, a value for each round that counts.
        rounding: texts of the first round that rounding made others than alone.
        other_depths: tokens of the first round that left elsewhere than alone, and not by rounding.
    """

    sizes: ServeSizes
    figures: dict[Setting, list[Figures]]
    rounding: int = 0
    other_depths: int = 0
    compared: int = 0


class Bench:
    """One model and one load."""

    def __init__(self, model: "OpenedModel", sizes: ServeSizes) -> None:
        watch = Stopwatch()
        self._model, self._sizes = watched(model, watch), sizes
        self._load = Load(self._model, sizes)
        room = {"capacity": self._load.capacity, "prefill_chunk": sizes.prefill_chunk}
        self._batch = RecordedBatch(self._model, watch, launch_rows=sizes.launch_rows, slots=sizes.residents, **room)
        self._rate: float | None = None

    def run(self) -> Rounds:
        """All rounds; the first one is dropped."""
        rounds = Rounds(self._sizes, {setting: [] for setting in dict.fromkeys(settings_of_a_round())})
        for number in range(self._sizes.rounds):
            served = self._round(number)
            if number == 0:
                self._compare(served, rounds)
                continue
            for setting, figures in self._figures(served):
                rounds.figures[setting].append(figures)
        return rounds

    def _round(self, number: int) -> list[tuple[Setting, Served]]:
        settings = list(enumerate(settings_of_a_round()))
        times = self._times(number)
        served = {
            place: self._serve(number, setting, times)
            for place, setting in (settings[::-1] if number % 2 else settings)
        }
        return [(setting, served[place]) for place, setting in settings]

    def _serve(self, number: int, setting: Setting, times: Sequence[float]) -> Served:
        requests = self._load.requests(number, setting)
        return serve(self._batch, self._load.planner(setting.strategy), requests, times)

    def _times(self, number: int) -> Sequence[float]:
        """When requests come: so often that lockstep has so much to do."""
        count, share = self._sizes.requests, self._sizes.load
        if share is None:
            return [0.0] * count
        if self._rate is None:
            self._serve(0, Setting("lockstep", "recompute"), [0.0] * count)
            self._rate = share * count / self._serve(0, Setting("lockstep", "recompute"), [0.0] * count).seconds
        return list(arrivals("poisson", count, self._rate, random.Random(number)))

    def _figures(self, served: Sequence[tuple[Setting, Served]]) -> Iterator[tuple[Setting, Figures]]:
        costs = recorded_costs((of for _, of in served), self._model.depths)
        of_tokens = recorded_costs((of for _, of in served), self._model.depths, prompts=False)
        full = dict(served)[FULL]
        for policy in POLICIES:
            of_policy = [(setting, of) for setting, of in served if setting.policy == policy]
            (_, first), *_, (_, again) = of_policy
            load = first.simulated(self._model.exits)
            best = min(self._simulated(load, costs, name, policy) for name in STRATEGIES)
            for setting, of in of_policy[:-1]:
                own = with_overhead(costs, of)
                bound = least_seconds(
                    of.simulated(self._model.exits, until=of.waited),
                    of_tokens,
                    prompt_rates(costs),
                    launch_rows=self._sizes.launch_rows,
                    kv_policy=policy,
                )
                replayed = self._simulated(of.simulated(self._model.exits), own, setting.strategy, policy)
                yield (
                    setting,
                    Figures(
                        over_lockstep=first.seconds / of.seconds,
                        over_full=full.seconds / of.seconds,
                        aa=first.seconds / again.seconds,
                        of_bound=bound / of.waited,
                        of_best=best / of.last,
                        simulated=replayed / of.last,
                        step=own.step,
                        token=own.token,
                        beside=1 - of.parts_seconds / of.seconds,
                        planning=of.planning_seconds / of.seconds,
                        forced=self._forced(of),
                        report=report_of(of.arrivals, of.times, of.slots.use, forced=self._forced(of)),
                        tokens_per_second=of.num_tokens / of.seconds,
                        depths=of.depths,
                    ),
                )

    def _simulated(
        self, load: Sequence[SimulatedRequest], costs: SegmentCosts, strategy: str, policy: KvPolicy
    ) -> float:
        sizes, depths = self._sizes, self._model.depths
        simulator = EngineSimulator(
            self._load.planner(strategy),
            costs,
            depths[1:-1],
            depths[-1],
            residents=sizes.residents,
            prefill_chunk=sizes.prefill_chunk,
            kv_policy=policy,
        )
        return simulator.run(load).seconds

    def _forced(self, served: Served) -> int:
        """Tokens that left at an exit that did not fire."""
        emissions = [emission for text in served.texts for emission in text]
        return sum(of.confidence < self._sizes.threshold for of in emissions if of.exit_layer < self._model.depths[-1])

    def _compare(self, served: Sequence[tuple[Setting, Served]], rounds: Rounds) -> None:
        """With what some requests say alone."""
        count = self._sizes.alone
        for policies in (("recompute", "fill"), ("propagate",)) if count else ():
            alone = self._alone(count, Setting("compaction", policies[0]))
            for setting, of in served:
                for text, own in zip(of.texts, alone, strict=False) if setting.policy in policies else ():
                    rounds.compared += 1
                    rounding, forced = differences(text, own, self._sizes.threshold)
                    rounds.rounding += rounding
                    rounds.other_depths += forced

    def _alone(self, count: int, setting: Setting) -> list[list[Emission]]:
        planner = self._load.planner(setting.strategy)
        return [serve(self._batch, planner, [of], [0.0]).texts[0] for of in self._load.requests(0, setting)[:count]]


def differences(text: Sequence[Emission], alone: Sequence[Emission], threshold: float) -> tuple[int, int]:
    """Whether rounding made them differ, and whether something else made a token leave elsewhere; after the first
    difference they have nothing to do with each other."""
    for one, other in zip(text, alone, strict=True):
        if one.exit_layer != other.exit_layer:
            first = min(one, other, key=lambda of: of.exit_layer)
            near = abs(first.confidence - threshold) < ROUNDING
            return (1, 0) if near else (0, 1)
        if one.token != other.token:
            return 1, 0
    return 0, 0
