"""What exits and fills cost a pipeline, and how well simulations foretell it: one half of bench_train.py.

Two real processes train a real model, and four that sleep instead of working show scheduling alone: they need no cores.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from bench_pipeline_simulated import (
    LargeSizes,
    balance_measures,
    exit_order_measures,
    filled_gain_measures,
    large_measures,
    layout_measures,
)
from bench_pipeline_sizes import ModelSizes, SleepingSizes
from bench_ranks import run_on_ranks
from bench_report import Measure, Rounds, measure_of

from megatron_ee.device import choose_device
from megatron_ee.parallel.costs import ModelCosts
from megatron_ee.parallel.pipeline.plan import WORK, Action, Kind, Plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.parallel.pipeline.validity import receive_of

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from bench_pipeline_steps import Timed

SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
NO_SPANS = "schedule megatron shows no actions, so nothing of it can be replayed"


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    model: ModelSizes = field(default_factory=ModelSizes)
    sleeping: SleepingSizes = field(default_factory=SleepingSizes)
    large: LargeSizes = field(default_factory=LargeSizes)


SMALL = PipelineSizes(
    ModelSizes((2, 2), (1, 1, 1, 1), 64, 4, 320, 64, 4, rounds=3, replays=2),
    SleepingSizes(0.001, num_stages=2, num_microbatches=4, rounds=3, replays=2),
    LargeSizes(8, 16),
)


def pipeline_measures(sizes: PipelineSizes) -> list[Measure]:
    """Every measure of this half.

    Raises:
        RankError: a process failed.
    """
    choose_device("cpu")
    from bench_pipeline_steps import model_steps, sleeping_steps

    of_model: list[Timed] = run_on_ranks(2, model_steps, sizes.model)
    of_sleepers: list[Timed] = run_on_ranks(sizes.sleeping.num_stages, sleeping_steps, sizes.sleeping)
    own = {"model": describe(asdict(sizes.model)), "sleeping": describe(asdict(sizes.sleeping))}
    durations = Durations(of_model, "1f1b")
    sleepers = f"p{sizes.sleeping.num_stages}_sleeping"
    fills = of_sleepers[0].fills
    assert fills is not None, "sleepers measure them"
    return [
        ratio_measure("step_ratio_exits_p2", of_model[0].exits, 1.02, own["model"] | premise(of_model, durations)),
        ratio_measure(f"step_ratio_exits_{sleepers}", of_sleepers[0].exits, 1.03, own["sleeping"]),
        *exit_order_measures(),
        *layout_measures(),
        *balance_measures(),
        *replay_measures("p2", of_model, own["model"]),
        *replay_measures(sleepers, of_sleepers, own["sleeping"]),
        *large_measures(sizes.large, durations.model_costs(sizes.model.stage_layers)),
        *filled_gain_measures(),
        ratio_measure(f"step_ratio_fills_{sleepers}", fills, 1.01, own["sleeping"] | filled_context(of_sleepers)),
    ]


def describe(sizes: dict[str, Any]) -> dict[str, Any]:
    """What figures depend on."""
    load = os.getloadavg()[0]
    return {"torch": torch.__version__, "cores": os.cpu_count(), "load_average": load, "sizes": sizes}


def ratio_measure(name: str, rounds: Rounds, goal: float, context: dict[str, Any]) -> Measure:
    seconds = {"step_a_ms": 1e3 * statistics.median(rounds.a), "step_b_ms": 1e3 * statistics.median(rounds.b)}
    return measure_of(name, rounds.paired, "lower", rounds.aa, context | seconds, goal)


class Durations:
    """Medians of a schedule's recorded actions, in seconds, as a `Cost`; one chunk a stage."""

    def __init__(self, ranks: "Sequence[Timed]", schedule: str) -> None:
        seconds: dict[tuple[Kind, int], list[float]] = {}
        transfers = []
        plan = ranks[0].replays[schedule].plan
        for spans in steps_of(ranks, schedule):
            transfers.append(transfer_of(plan, spans))
            for span in spans:
                seconds.setdefault((span.action.kind, span.action.stage), []).append(span.end - span.start)
        self._medians = {key: statistics.median(values) for key, values in seconds.items()}
        self.transfer = statistics.median(transfers)

    def __call__(self, action: Action) -> float:
        return self._medians[action.kind, action.stage]

    def of(self, stage: int) -> tuple[float, float, float]:
        """F, X and B."""
        forward, exits, backward = (self._medians[kind, stage] for kind in (Kind.F, Kind.X, Kind.B))
        return forward, exits, backward

    def model_costs(self, stage_layers: tuple[int, int]) -> ModelCosts:
        """Of a model of one kind of exits on two stages; what the first one takes longer is the embedding's."""
        (first_f, _, first_b), (last_f, exits, last_b) = self.of(0), self.of(1)
        first, last = stage_layers
        return ModelCosts(
            layer_forward=last_f / last,
            layer_backward=last_b / last,
            embedding_forward=max(0.0, first_f - first * last_f / last),
            embedding_backward=max(0.0, first_b - first * last_b / last),
            exits={"norm": exits},
            transfer=self.transfer,
        )


def premise(ranks: "Sequence[Timed]", durations: Durations) -> dict[str, Any]:
    """What exits at no cost presuppose, as measured: a stage with its exit no slower than the last stage; and what the
    simulation makes of the same durations."""
    stages = [durations.of(stage) for stage in range(len(ranks))]
    plans = ranks[0].replays["1f1b"].plan, ranks[0].plan_without
    having, without = (simulate(plan, durations, transfer=durations.transfer).makespan for plan in plans)
    return {
        "f_x_b_ms_of_stages": [[1e3 * seconds for seconds in stage] for stage in stages],
        "first_over_last_stage": sum(stages[0]) / sum(stages[-1]),
        "head_over_first_stage": stages[0][1] / (stages[0][0] + stages[0][2]),
        "transfer_ms": 1e3 * durations.transfer,
        "simulated_ratio": having / without,
    }


def replay_measures(where: str, ranks: "Sequence[Timed]", context: dict[str, Any]) -> list[Measure]:
    """How far a step's real length is from the simulation of its own durations, for each schedule.

    A/A is a step over the one before it: how different two real ones are.
    """
    measures = []
    for name, replays in ranks[0].replays.items():
        steps = list(steps_of(ranks, name))
        real = [length_of(spans) for spans in steps]
        transfers = [transfer_of(replays.plan, spans) for spans in steps]
        ratios = [
            replayed(replays.plan, spans, transfer) / length
            for spans, transfer, length in zip(steps, transfers, real, strict=True)
        ]
        aa = statistics.median(later / earlier for earlier, later in pairwise(real))
        details = {
            "step_ms": 1e3 * statistics.median(real),
            "transfer_ms": 1e3 * statistics.median(transfers),
            "simulated_over_real": statistics.median(ratios),
            "fills": [f"{fill.kind} {fill.stage}" for fill in replays.plan.fills],
            "left_out": NO_SPANS,
        }
        errors = [abs(ratio - 1) for ratio in ratios]
        measures.append(measure_of(f"replay_error_{name}_{where}", errors, "lower", aa, context | details, 0.05))
    return measures


def filled_context(ranks: "Sequence[Timed]") -> dict[str, Any]:
    fills = ranks[0].replays["filled-1f1b"].plan.fills
    return {"fills": [f"{fill.kind} {fill.stage}" for fill in fills]}


def steps_of(ranks: "Sequence[Timed]", schedule: str) -> list[list[Span]]:
    """The spans of all ranks, step by step."""
    per_rank = [timed.replays[schedule].steps for timed in ranks]
    return [[span for spans in step for span in spans] for step in zip(*per_rank, strict=True)]


def length_of(spans: Sequence[Span]) -> float:
    """Seconds from the first piece of work on any stage to the end of the last."""
    work = [span for span in spans if span.action.kind in WORK]
    return max(span.end for span in work) - min(span.start for span in work)


def replayed(plan: Plan, spans: Sequence[Span], transfer: float) -> float:
    """What the simulation makes of a step's own durations."""
    seconds = {span.action: span.end - span.start for span in spans if span.action.kind in WORK}
    return simulate(plan, seconds.__getitem__, transfer=transfer).makespan


def transfer_of(plan: Plan, spans: Sequence[Span]) -> float:
    """Median time from a send's start to its receive's end, of those messages that were awaited already; without any,
    they count nothing."""
    span_of = {span.action: span for span in spans}
    pairs = [(send, span_of[receive_of(plan, action)]) for action, send in span_of.items() if action.kind in SENDS]
    awaited = [receive.end - send.start for send, receive in pairs if receive.start <= send.start]
    return statistics.median(awaited) if awaited else 0.0
