"""How the simulator launches, and what time that takes: one launch after the other, or one on each stage of a pipeline.

**The time of a pipeline.** Its processes do the same things in the same order, which the virtual clock of estimated
costs says; how long that takes is another question. So each process has a clock of its own here. It moves on by what
the process does: by `step` for every launch of any stage, since every process plans for all of them and takes in what
comes of all; by layers, heads and tokens of its own launches; by keys and values that it makes for layers that tokens
skip. And it waits where the process waits: for what exits say, and for rows that come to its stage. The first process,
which tokens come back to, has the time that counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.simulated_batch import SimulatedBatch, SimulatedFlight
from megatron_ee.inference.scheduling.slots import SlotCounter, StageUse
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.timetable import Timetable


class SimulatedLaunches(Protocol):
    @property
    def now(self) -> float: ...

    def step(self) -> None:
        """Run something."""
        ...

    def wait(self, until: float) -> None:
        """Nobody is there before."""
        ...

    @property
    def stages(self) -> Sequence[StageUse]:
        """What each stage of a pipeline did so far; none: there is no pipeline."""
        ...


class SimulatedSingle:
    def __init__(
        self, batch: SimulatedBatch, planner: Planner, costs: SegmentCosts, slots: SlotCounter, *, now: float
    ) -> None:
        self._batch, self._planner, self._costs, self._slots = batch, planner, costs, slots
        self.now = now

    @property
    def stages(self) -> Sequence[StageUse]:
        return ()

    def wait(self, until: float) -> None:
        self.now = until

    def step(self) -> None:
        batch, costs = self._batch, self._costs
        plan = self._planner.plan(batch.fronts(), batch.num_launches, batch.fillers, batch.ready)
        self._slots.count(plan)
        flight = batch.depart(plan)
        landing = batch.arrive(flight)
        self.now += costs.of(plan.start, plan.stop, plan.num_rows) + costs.of_head(plan.stop, flight.num_looked_at)
        self.now += costs.of_store(plan.stop, batch.num_layers, landing.stored) if landing.stored else 0.0
        for start, stop, rows in landing.caught_up:
            self.now += costs.of(start, stop, rows)
            self._slots.catch_up(start, stop, rows)
        self.now += costs.step + costs.token * len(flight.saying)
        _say(flight, self.now)


@dataclass(frozen=True, slots=True)
class _Timed:
    """A launch, and when its process has done it."""

    flight: SimulatedFlight
    done: float


class SimulatedPipeline:
    """
    Args:
        recorder: notes launches, by the virtual clock and by that of each process.
    """

    def __init__(
        self,
        batch: SimulatedBatch,
        planner: StagePlanner,
        costs: SegmentCosts,
        slots: SlotCounter,
        *,
        now: float,
        recorder: Recorder | None = None,
    ) -> None:
        self._batch, self._planner, self._costs, self._slots = batch, planner, costs, slots
        self._recorder, self._started = recorder, now
        self._timetable: Timetable[_Timed] = Timetable(planner.stages.count)
        self._clocks = [now] * planner.stages.count
        self._ran = [[0.0, 0.0] for _ in self._clocks]  # of each stage: launches of tokens, and of nothing but fills
        if recorder is not None:
            recorder.begin(planner.stages.stops)

    @property
    def now(self) -> float:
        return self._clocks[0]

    @property
    def stages(self) -> Sequence[StageUse]:
        whole = max(self._clocks) - self._started
        return [StageUse(real / whole, filled / whole) if whole else StageUse() for real, filled in self._ran]

    def wait(self, until: float) -> None:
        self._clocks = [max(until, now) for now in self._clocks]

    def step(self) -> None:
        """As `PipelineLaunches` does it."""
        fronts = self._batch.fronts()
        for stage in self._timetable.free:
            self._begin(stage, fronts)
        ending = self._timetable.end()
        assert ending, "nobody can go on"
        for timed in ending:
            self._end(timed)
        for timed in ending:
            _say(timed.flight, self.now)
            for _ in timed.flight.saying:
                self._planner.saw(timed.flight.plan.stop)

    def _begin(self, stage: int, fronts: Sequence[Front]) -> None:
        batch, planner, costs = self._batch, self._planner, self._costs
        plan = planner.plan(
            stage,
            fronts,
            batch.num_launches,
            batch.fillers,
            batch.ready,
            residents=batch.num_going,
            coming=self._timetable.coming(stage),
            urgent=batch.crowded,
        )
        if plan is None:
            return
        self._slots.count(plan)
        flight = batch.depart(plan)
        self._clocks = [now + costs.step for now in self._clocks]
        began = self._clocks[stage]
        computing = costs.of(plan.start, plan.stop, plan.num_rows) + costs.of_head(plan.stop, flight.num_looked_at)
        done = self._clocks[stage] = began + computing + costs.token * len(flight.saying)
        self._ran[stage][0 if plan.counts else 1] += done - began
        estimate = planner.cost_of(plan)
        if self._recorder is not None:
            virtual = self._timetable.now, self._timetable.now + estimate
            self._recorder.note(stage, plan, virtual, (began, done))
        self._timetable.begin(stage, _Timed(flight, done), estimate, len(plan.counts))

    def _end(self, timed: _Timed) -> None:
        """Those wait who are told what exits say, and those that rows come to."""
        plan, stages = timed.flight.plan, self._planner.stages
        is_told, crosses = timed.flight.num_looked_at > 0, plan.stop in stages.borders
        stage = stages.of(plan.start)
        for other, now in enumerate(self._clocks):
            if is_told or (crosses and other == stage + 1):
                self._clocks[other] = max(now, timed.done)
        landing = self._batch.arrive(timed.flight)
        for other in range(stages.count) if landing.stored else ():
            first, last = max(plan.stop, stages.start(other)), stages.stops[other]
            if first < last:
                self._clocks[other] += self._costs.of_store(first, last, landing.stored)


def _say(flight: SimulatedFlight, now: float) -> None:
    for slot in flight.saying:
        flight.sequences[slot].times.append(now)
