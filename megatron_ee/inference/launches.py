"""How an engine launches: one launch after the other, or one on each stage of a pipeline."""

import time
from collections.abc import Sequence
from typing import Protocol

from megatron_ee.inference.answers import Spoken
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.flights import Flight
from megatron_ee.inference.request import Emission
from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.timetable import Timetable


class Launches(Protocol):
    def step(self, fronts: Sequence[Front]) -> Spoken:
        """Run something of these, which are all that may go on. Returns what is said with it."""
        ...

    def settle(self) -> None:
        """End what is under way; all sequences have left."""
        ...


def launches_of(batch: Batch, planner: Planner | StagePlanner, recorder: Recorder | None = None) -> Launches:
    """
    Args:
        recorder: of a pipeline's launches.
    """
    if isinstance(planner, StagePlanner):
        return PipelineLaunches(batch, planner, recorder)
    return SingleLaunches(batch, planner)


class SingleLaunches:
    def __init__(self, batch: Batch, planner: Planner) -> None:
        self._batch, self._planner = batch, planner

    def step(self, fronts: Sequence[Front]) -> Spoken:
        return self._batch.launch(self._batch.plan(self._planner, fronts)) if fronts else []

    def settle(self) -> None:
        pass


class PipelineLaunches:
    """A step begins launches on all stages that have nothing to do, and ends those that end next."""

    def __init__(self, batch: Batch, planner: StagePlanner, recorder: Recorder | None = None) -> None:
        self._batch, self._planner, self._recorder = batch, planner, recorder
        self._timetable: Timetable[Flight] = Timetable(planner.stages.count)
        if recorder is not None:
            recorder.begin(planner.stages.stops)

    def step(self, fronts: Sequence[Front]) -> Spoken:
        for stage in self._timetable.free:
            self._begin(stage, fronts)
        spoken = [said for flight in self._timetable.end() for said in self._batch.arrive(flight)]
        for _, emission in spoken:
            if isinstance(emission, Emission):
                self._planner.saw(emission.exit_layer)
        return spoken

    def settle(self) -> None:
        while flights := self._timetable.end():
            for flight in flights:
                self._batch.arrive(flight)
        self._batch.settle()

    def _begin(self, stage: int, fronts: Sequence[Front]) -> None:
        planner, batch = self._planner, self._batch
        plan = planner.plan(
            stage,
            fronts,
            batch.num_launches,
            batch.fillers(planner.carries),
            batch.ready,
            residents=batch.num_going,
            coming=self._timetable.coming(stage),
            urgent=batch.crowded,
        )
        if plan is not None:
            began = time.perf_counter()
            flight, cost = batch.depart(plan), planner.cost_of(plan)
            if self._recorder is not None:
                now, seconds = self._timetable.now, (began, time.perf_counter())
                self._recorder.note(stage, plan, (now, now + cost), seconds if flight.arrival is not None else None)
            self._timetable.begin(stage, flight, cost, len(plan.counts))
