"""The simulator against the engine itself: with a request's own depths it plans the same launches, slot by slot."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.decoding import opened, request
from helpers.models import whole_model

from megatron_ee.config import ExitParams, KvPolicy, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.simulate import EngineSimulator, SimulatedRequest
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

STEPS = SegmentCosts({}, step=1.0)
"""A launch is a unit of time, so that the engine's clock is its count of steps."""
MIXED: list[dict[str, Any]] = [
    {"threshold": 0.05},
    {"thresholds": {2: 0.06, 5: 0.03}},
    {"exits": (5,), "threshold": 0.04},
    {"mode": "full"},
]


class RecordingPlanner(Planner):
    """Keeps what it has planned."""

    def __init__(self, planner: Planner) -> None:
        self.__dict__.update(planner.__dict__)
        self.plans: list[LaunchPlan] = []

    def plan(self, *arguments: Any) -> LaunchPlan:
        self.plans.append(super().plan(*arguments))
        return self.plans[-1]


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> OpenedModel:
    return opened(whole_model(mesh, exits=[2, 5], dtype=torch.float64))


def planner_of(model: OpenedModel, strategy: str, residents: int, chunk: int) -> RecordingPlanner:
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": 3, "max_wait": 6})
    planner = make_planner(params, model.launch_costs, model.depths, residents=residents, prefill_chunk=chunk)
    return RecordingPlanner(planner)


def requests_of(seed: int, policy: KvPolicy, max_pending: int, mixed: Sequence[dict[str, Any]]) -> list[Request]:
    numbers = random.Random(seed)
    return [
        request(
            [numbers.randrange(64) for _ in range(numbers.choice([1, 2, 5, 6, 7, 17]))],
            ExitParams.model_validate(
                {"kv_policy": policy, "max_pending": max_pending, **numbers.choice(mixed)},
            ),
            max_new_tokens=numbers.randint(1, 14),
        )
        for _ in range(14)
    ]


def served(engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]) -> tuple[Any, Any]:
    """Their texts, and after which step each token was there."""
    texts: list[list[Emission]] = [[] for _ in requests]
    times: list[list[float]] = [[] for _ in requests]
    now, added = 0.0, 0
    while added < len(requests) or not engine.is_idle:
        if engine.is_idle:
            now = max(now, arrivals[added])
        while added < len(requests) and arrivals[added] <= now:
            engine.add(requests[added])
            added += 1
        now += 1
        for number, emission in engine.step():
            texts[number].append(emission)
            times[number].append(now)
    return texts, times


def simulated(request: Request, text: Sequence[Emission], arrival: float, exits: Sequence[int]) -> SimulatedRequest:
    asked = () if request.exit.mode == "full" else tuple(request.exit.exits or exits)
    return SimulatedRequest(len(request.prompt), tuple(of.exit_layer for of in text), arrival, asked)


@pytest.mark.parametrize("chunk", [6, 64])
@pytest.mark.parametrize("policy", ["recompute", "fill", "propagate"])
@pytest.mark.parametrize("strategy", ["lockstep", "compaction", "rebatch"])
@pytest.mark.parametrize("max_pending", [3, 256])
def test_launches_and_times_are_those_of_the_engine(
    model: OpenedModel, strategy: str, policy: KvPolicy, chunk: int, max_pending: int
) -> None:
    requests = requests_of(5, policy, max_pending, MIXED)
    numbers = random.Random(1)
    arrivals = sorted(numbers.choice([0.0, 0.0, 4.0, 9.0, 400.0]) for _ in requests)
    real, of_simulator = (planner_of(model, strategy, 5, chunk) for _ in range(2))
    engine = Engine(Batch(model, slots=5, capacity=40, prefill_chunk=chunk), real)
    texts, times = served(engine, requests, arrivals)
    depths = {emission.exit_layer for text in texts for emission in text}
    assert depths == {2, 5, 8}, "all of it happens"
    simulator = EngineSimulator(
        of_simulator,
        STEPS,
        model.exits,
        8,
        residents=5,
        prefill_chunk=chunk,
        kv_policy=policy,
        max_pending=max_pending,
    )
    load = [simulated(*of, model.exits) for of in zip(requests, texts, arrivals, strict=True)]
    run = simulator.run(load)
    assert of_simulator.plans == real.plans
    assert run.times == times
    work: Work = engine.batch.walk.work
    assert {segment: use.launches + use.catch_ups for segment, use in run.use.items()} == work.launches
    assert {segment: use.real + use.filled + use.caught_up for segment, use in run.use.items()} == work.rows
    caught_up = sum(use.caught_up for use in run.use.values())
    assert caught_up > 0 if (max_pending, policy) == (3, "recompute") else caught_up == 0 or policy == "fill"
    filled = sum(use.filled for use in run.use.values())
    assert (filled > 0) == (policy == "fill" or (strategy == "lockstep" and policy != "propagate")), filled
