"""An engine whose batch is spread over the stages of a pipeline, in this process or in one each."""

from collections.abc import Sequence

from megatron_ee.inference.answers import Spoken
from megatron_ee.inference.batch import Batch, Flight
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.scheduling.fronts import Front
from megatron_ee.inference.scheduling.stage_planner import StagePlanner
from megatron_ee.inference.timetable import Timetable


class PipelineEngine(Engine):
    """A step begins launches on all stages that have nothing to do, and ends those that end next. Requests come and go
    at any step, whatever is under way.

    Processes that hold a stage each have to be told the same, in the same order.
    """

    def __init__(self, batch: Batch, planner: StagePlanner, *, whole: bool = True) -> None:
        super().__init__(batch, planner, whole=whole)
        self._stage_planner = planner
        self._timetable: Timetable[Flight] = Timetable(planner.stages.count)

    def _run(self, fronts: Sequence[Front]) -> Spoken:
        for stage in self._timetable.free:
            self._begin(stage, fronts)
        spoken = [said for flight in self._timetable.end() for said in self.batch.arrive(flight)]
        for _, emission in spoken:
            if emission is not None:
                self._stage_planner.saw(emission.exit_layer)
        return spoken

    def _begin(self, stage: int, fronts: Sequence[Front]) -> None:
        planner, batch = self._stage_planner, self.batch
        plan = planner.plan(
            stage,
            fronts,
            batch.num_launches,
            batch.fillers(planner.carries),
            batch.ready,
            residents=batch.num_going,
            left=self._timetable.left(stage),
            urgent=batch.crowded,
        )
        if plan is not None:
            self._timetable.begin(stage, batch.depart(plan), planner.cost_of(plan))
