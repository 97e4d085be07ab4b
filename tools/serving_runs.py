"""One load, served by each strategy: what simulations and recommendations share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving_costs import Machine

from megatron_ee.config import KvPolicy, SchedulingParams
from megatron_ee.inference.decoding_record import Recorder
from megatron_ee.inference.scheduling.report import Report, report_of_run
from megatron_ee.inference.scheduling.simulate import EngineSimulator, SimulatedRequest
from megatron_ee.inference.scheduling.strategies.named import planner_for
from megatron_ee.inference.stages import Stages, depths_of

STRATEGIES = ("lockstep", "compaction", "rebatch")
FULL = "full depth"
PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Setting:
    """
    Attributes:
        launch_rows: None: as many as residents.
        stops: the layer that each stage of a pipeline ends with; none: there is no pipeline.
    """

    strategy: str
    residents: int
    launch_rows: int | None
    max_wait: int
    kv_policy: KvPolicy
    stops: tuple[int, ...] = ()

    @property
    def stages(self) -> Stages | None:
        return Stages(self.stops) if len(self.stops) > 1 else None

    @property
    def rows(self) -> int:
        return self.residents if self.launch_rows is None else self.launch_rows

    @property
    def scheduling(self) -> SchedulingParams:
        return SchedulingParams.model_validate(
            {"strategy": self.strategy, "launch_rows": self.launch_rows, "max_wait": self.max_wait}
        )


def serve(
    load: Sequence[SimulatedRequest], machine: Machine, setting: Setting, *, recorder: Recorder | None = None
) -> Report:
    """What becomes of a load.

    Args:
        recorder: notes a pipeline's launches.
    """
    stages = setting.stages or Stages((machine.num_layers,))
    planner = planner_for(
        setting.scheduling,
        machine.weighed.cut_at(stages.borders),
        stages,
        depths_of(machine.exits, stages),
        residents=setting.residents,
        prefill_chunk=PREFILL_CHUNK,
    )
    simulator = EngineSimulator(
        planner,
        machine.costs.cut_at(stages.borders),
        machine.exits,
        machine.num_layers,
        residents=setting.residents,
        prefill_chunk=PREFILL_CHUNK,
        kv_policy=setting.kv_policy,
        recorder=recorder,
    )
    return report_of_run(simulator.run(load))


def serve_at_full_depth(load: Sequence[SimulatedRequest], machine: Machine, setting: Setting) -> Report:
    """The same load where no exit is asked."""
    deep = [replace(of, depths=(machine.num_layers,) * len(of.depths), exits=()) for of in load]
    return serve(deep, machine, replace(setting, strategy="compaction"))
