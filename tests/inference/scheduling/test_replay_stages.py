"""The simulator against the engine itself on the stages of a pipeline: the same launches, slot by slot, at the same
times of the virtual clock."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.decoding import opened
from helpers.models import whole_model
from inference.scheduling.test_replay import MIXED, requests_of, simulated

from megatron_ee.config import KvPolicy, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.ring import Pipeline
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.scheduling.simulate import EngineSimulator
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.scheduling.strategies.named import make_stage_planner
from megatron_ee.inference.stages import Stages
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

LATE = 10.0**15
"""When all that came before has long ended."""
CHUNK, RESIDENTS = 6, 5


class RecordingPlanner(StagePlanner):
    """Keeps what it has planned, stage by stage."""

    def __init__(self, planner: StagePlanner) -> None:
        self.__dict__.update(planner.__dict__)
        self.plans: list[tuple[int, LaunchPlan]] = []

    def plan(self, stage: int, *arguments: Any, **named: Any) -> LaunchPlan | None:
        plan = super().plan(stage, *arguments, **named)
        if plan is not None:
            self.plans.append((stage, plan))
        return plan


@pytest.fixture(scope="module")
def whole(mesh: Mesh) -> OpenedModel:
    return opened(whole_model(mesh, exits=[2, 5], dtype=torch.float64))


def planner_of(model: OpenedModel, strategy: str, launch_rows: int | None) -> RecordingPlanner:
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": launch_rows, "max_wait": 6})
    return RecordingPlanner(
        make_stage_planner(
            params, model.launch_costs, model.stages, model.depths, residents=RESIDENTS, prefill_chunk=CHUNK
        )
    )


def served(engine: Engine, requests: list[Request]) -> list[list[Emission]]:
    """All but the last two at once, which come when the others have ended."""
    texts: list[list[Emission]] = []
    for batch in (requests[:-2], requests[-2:]):
        texts += [[] for _ in batch]
        for request in batch:
            engine.add(request)
        while not engine.is_idle:
            for number, emission in engine.step():
                assert isinstance(emission, Emission)
                texts[number].append(emission)
    return texts


@pytest.mark.parametrize("stops", [(2, 8), (3, 6, 8)], ids=str)
@pytest.mark.parametrize("strategy", ["lockstep", "compaction", "rebatch"])
@pytest.mark.parametrize("policy", ["recompute", "fill", "propagate"])
def test_launches_and_virtual_times_are_those_of_the_engine(
    whole: OpenedModel, stops: tuple[int, ...], strategy: str, policy: KvPolicy
) -> None:
    model = replace(whole, pipeline=Pipeline(Stages(stops), whole.facts))
    numbers = random.Random(f"{stops} {strategy} {policy}")
    max_pending, launch_rows = numbers.choice([2, 3, 256]), numbers.choice([None, 2])
    requests = requests_of(5, policy, max_pending, MIXED)
    real, of_simulator = (planner_of(model, strategy, launch_rows) for _ in range(2))
    engine_recorder, simulator_recorder = Recorder(), Recorder()
    batch = Batch(model, slots=RESIDENTS, capacity=40, prefill_chunk=CHUNK)
    engine = Engine(batch, real, recorder=engine_recorder)
    texts = served(engine, requests)
    assert {emission.exit_layer for text in texts for emission in text} == {2, 5, 8}, "all of it happens"
    simulator = EngineSimulator(
        of_simulator,
        model.launch_costs,
        model.exits,
        8,
        residents=RESIDENTS,
        prefill_chunk=CHUNK,
        kv_policy=policy,
        max_pending=max_pending,
        recorder=simulator_recorder,
    )
    arrivals = [0.0] * (len(requests) - 2) + [LATE] * 2
    run = simulator.run([simulated(*of, model.exits) for of in zip(requests, texts, arrivals, strict=True)])
    assert of_simulator.plans == real.plans
    at_once, simulated_at_once = (
        [replace(of, seconds=None) for of in recorder.record.launches]
        for recorder in (engine_recorder, simulator_recorder)
    )
    assert at_once == simulated_at_once
    work: Work = batch.walk.work
    rows = {segment: use.real + use.filled for segment, use in run.use.items()}
    gone = sum(rows.values()) - sum(work.rows.values())
    assert {segment: use.launches for segment, use in run.use.items()} == work.launches
    assert all(rows[segment] >= count for segment, count in work.rows.items())
    assert gone == 0 or policy == "fill" or strategy == "lockstep", "only of texts that ended meanwhile"
    assert not any(use.catch_ups for use in run.use.values()), "stages catch up as they have time"
