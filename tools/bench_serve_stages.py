"""One stage of a pipeline whose layers sleep, for benches: as long as they were measured to take. Planning, messages
and bookkeeping are the real ones, and so is the order of things; what tokens do is drawn beforehand."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_ee.config import ExitParams, ExitsConfig, KvPolicy, ModelConfig, ParallelConfig, SamplingParams
from megatron_ee.config import SchedulingParams as Scheduling
from megatron_ee.device import choose_device
from megatron_ee.inference.answers import Answer, Said
from megatron_ee.inference.arrivals import Arrival
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.flights import Flight
from megatron_ee.inference.loading import join_stages
from megatron_ee.inference.measures import MEASURES
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.progress import is_asked
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.strategies.named import planner_for
from megatron_ee.inference.stages import Stages
from megatron_ee.model.initialize import initialize
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.tokenizer import ByteTokenizer

_PROMPT = (1, 2)


@dataclass(frozen=True, slots=True)
class Course:
    """What is served, and how.

    Attributes:
        stops: the layer that each stage ends with.
        depths: of each request's tokens, the layers after which they leave.
        full: they do not; every token runs all layers.
        costs: of launches, layer by layer, in seconds.
    """

    stops: tuple[int, ...]
    exits: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    policy: KvPolicy
    full: bool
    costs: SegmentCosts


@dataclass(frozen=True, slots=True)
class Ran:
    """
    Attributes:
        seconds: from the first launch to the last token.
        tokens: that were said.
        real, filled: of the time, the share that each stage spent on launches with tokens on their way, and on those
            with nothing but rows that are filled in.
    """

    seconds: float
    tokens: int
    real: tuple[float, ...]
    filled: tuple[float, ...]


def serve_all(courses: Sequence[Course], rounds: int) -> list[list[Ran]]:
    """Each course in every round, in turns: what came of it, on every rank the same. Runs in ranks, one a stage."""
    torch.set_num_threads(1)
    served: list[list[Ran]] = [[] for _ in courses]
    models = {course.stops: _model(course) for course in courses}
    for _ in range(rounds):
        for course, of in zip(courses, served, strict=True):
            of.append(_serve(models[course.stops], course))
    return served


def _model(course: Course) -> OpenedModel:
    """Layers of the least size: nobody runs them."""
    mesh = open_mesh(ParallelConfig(pipeline=len(course.stops)), choose_device("cpu"))
    model = ModelConfig(num_layers=course.stops[-1], hidden_size=32, num_attention_heads=2, vocab_size=256)
    exits = ExitsConfig(layers=course.exits)
    stages = Stages(course.stops, mesh.pipeline_rank)
    first, last = stages.held(0, model.num_layers)
    own = tuple(layer for layer in (*course.exits, model.num_layers) if first < layer <= last)
    chunks = [Chunk(first, last, own)]
    stage = Stage(model, exits, chunks, vocab_size=256, groups=mesh.groups, device=mesh.device)
    initialize(stage, 0)
    stage.eval().requires_grad_(False)
    pipeline = join_stages(stage, stages, mesh, timeout=120.0)
    return OpenedModel(stage, ByteTokenizer(), course.exits, MEASURES, mesh=mesh, pipeline=pipeline)


def _serve(model: OpenedModel, course: Course) -> Ran:
    count = len(course.depths)
    batch = SleepingBatch(model, course, slots=count, capacity=len(_PROMPT) + max(map(len, course.depths)))
    params = Scheduling(strategy="compaction")
    planner = planner_for(
        params, course.costs, model.stages, model.depths, residents=count, prefill_chunk=len(_PROMPT) * count
    )
    engine = Engine(batch, planner)
    settings = {"mode": "full"} if course.full else {"threshold": 0.5, "kv_policy": course.policy}
    exit_params = ExitParams.model_validate(settings)
    for depths in course.depths:
        sampling = SamplingParams(max_new_tokens=len(depths), ignore_eos=True)
        engine.add(Request(_PROMPT, sampling, exit_params))
    dist.barrier()
    started, tokens = time.perf_counter(), 0
    while not engine.is_idle:
        tokens += len(engine.step())
    seconds = time.perf_counter() - started
    engine.close()
    spent: list[Any] = [None] * model.stages.count
    dist.all_gather_object(spent, (seconds, batch.real, batch.filled))
    longest = max(of[0] for of in spent)
    return Ran(longest, tokens, *(tuple(of[place] / longest for of in spent) for place in (1, 2)))


class SleepingBatch(Batch):
    """
    Attributes:
        real, filled: seconds that this stage has slept, see `Ran`.
    """

    def __init__(self, model: OpenedModel, course: Course, **room: Any) -> None:
        super().__init__(model, **room)
        self._course = course
        self._numbers: dict[int, int] = {}
        self.real = self.filled = 0.0

    def join(self, sequence: Any, **more: Any) -> int | None:
        slot = super().join(sequence, **more)
        if slot is not None:
            self._numbers[slot] = len(self._numbers)
        return slot

    def _run(self, flight: Flight, tokens: Mapping[int, Sequence[int]] | None) -> None:
        plan, costs = flight.plan, self._course.costs
        asked = [slot for slot, of in flight.entering.items() if is_asked(of, plan.stop, self._num_layers)]
        seconds = costs.of(plan.start, plan.stop, plan.num_rows) + costs.of_head(plan.stop, len(asked))
        time.sleep(seconds)
        if plan.counts:
            self.real += seconds
        else:
            self.filled += seconds
        states_NH = torch.zeros(flight.leg.num_rows, self._model.stage.model.hidden_size)
        flight.arrival = cast(Arrival, SimpleNamespace(output_NH=states_NH))
        flight.answers = {slot: answer for slot in asked if (answer := self._answer(slot, plan.stop)) is not None}
        if self._ring is not None:
            self._ring.depart(flight, self._model.runner)

    def _answer(self, slot: int, layer: int) -> Answer | None:
        depths = self._course.depths[self._numbers[slot]]
        depth = depths[len(self._sequences[slot].draws.answer)]
        leaves = layer == self._num_layers or (not self._course.full and depth <= layer)
        return Said((Emission(7, layer, 1.0),)) if leaves else None


def mean_stages(course: Course) -> float:
    """Stages that a token passes, on the average."""
    stages = Stages(course.stops)
    passed = [stages.of(depth - 1) + 1 for of in course.depths for depth in of]
    return sum(passed) / len(passed)


def at_full_depth(course: Course) -> Course:
    return replace(course, full=True)
