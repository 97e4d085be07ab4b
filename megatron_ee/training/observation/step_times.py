"""What the phases of all ranks come to: means per step, each stage's work, and the pipeline's idle time."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.simulate import simulate

PHASE_OF = {Kind.F: "forward", Kind.X: "exits", Kind.B: "backward", Kind.W: "weights"}
"""The phase that a kind of work is."""

PHASES = (
    *("rank_wait", "data", "prepare", *PHASE_OF.values(), "p2p_wait", "forward_backward", "grad_sync", "optimizer"),
    "checkpoint",
)
"""See `phases`."""

_SHARE_OF_SIMULATION = 0.005  # of the time


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank's sums over some steps, in seconds.

    Attributes:
        phases: in the order of PHASES.
        step: all of the steps, with `rank_wait`.
        makespan: from the begin of the stage's first action to the end of its last work.
    """

    phases: tuple[float, ...]
    step: float
    makespan: float

    @property
    def busy(self) -> float:
        """At F, X, B and W."""
        return sum(seconds for name, seconds in zip(PHASES, self.phases, strict=True) if name in PHASE_OF.values())


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What it comes to.

    Attributes:
        step_s: of a step, the wait before it included; the mean over ranks.
        phases_s: means over ranks, per step but for `checkpoint`, which is of the one just before. What no rank has
            done is left out.
        num_stages: of the pipeline.
        busy_s: by rank, at F, X, B and W of a step; 0 where the runtime shows no actions.
        bubble_fraction: `Timeline.bubble_fraction` of the steps as they ran: the mean over pipelines of the share of
            stages x makespan in which a stage is at no work. A makespan is that of the stage that takes longest from
            its first action to the end of its last work. None where there is one stage, or no actions are shown.
        planned_bubble_fraction: see `PlannedBubble`; on the main rank, and not every time where steps are short.
    """

    step_s: float
    phases_s: Mapping[str, float]
    num_stages: int
    busy_s: tuple[float, ...]
    bubble_fraction: float | None
    planned_bubble_fraction: float | None = None

    @classmethod
    def of(cls, ranks: Sequence[RankTimes], *, num_steps: int, num_stages: int) -> Self:
        """
        Args:
            ranks: all of them in order: stage by stage.
        """
        sums = {name: sum(rank.phases[place] for rank in ranks) / len(ranks) for place, name in enumerate(PHASES)}
        return cls(
            step_s=sum(rank.step for rank in ranks) / len(ranks) / num_steps,
            phases_s={
                name: seconds / (1 if name == "checkpoint" else num_steps) for name, seconds in sums.items() if seconds
            },
            num_stages=num_stages,
            busy_s=tuple(rank.busy / num_steps for rank in ranks),
            bubble_fraction=_bubble_fraction(ranks, num_stages) if num_stages > 1 else None,
        )

    def figures(self) -> dict[str, float]:
        """As loggers take them."""
        figures = {f"time/{name}_s": seconds for name, seconds in self.phases_s.items()}
        if self.bubble_fraction is not None:
            figures["pipeline/bubble_fraction"] = self.bubble_fraction
            ranks_per_stage = len(self.busy_s) // self.num_stages
            for stage in range(self.num_stages):
                busy_s = self.busy_s[stage * ranks_per_stage : (stage + 1) * ranks_per_stage]
                figures[f"pipeline/stage_{stage}_busy_s"] = sum(busy_s) / ranks_per_stage
        if self.planned_bubble_fraction is not None:
            figures["pipeline/planned_bubble_fraction"] = self.planned_bubble_fraction
        return figures


class PlannedBubble:
    """The bubble that the plan has with durations as measured: what it would be if no stage ever waited for more than
    the work of others. A plan of many actions takes long to simulate, some 10 us each; it is done so seldom that it
    takes half a percent of the time at most."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._saved_s = math.inf  # time that may be spent on it

    def fraction(self, durations_s: Sequence[Sequence[float]], *, elapsed_s: float) -> float | None:
        """`Timeline.bubble_fraction`, or None where it is not time yet.

        Args:
            durations_s: of `plan.actions`.
            elapsed_s: since the last call.
        """
        self._saved_s += _SHARE_OF_SIMULATION * elapsed_s
        if self._saved_s < 0:
            return None
        started = time.perf_counter()
        durations = dict[Action, float]()
        for actions, of_stage in zip(self._plan.actions, durations_s, strict=True):
            durations.update(zip(actions, of_stage, strict=False))  # stages with fewer actions are padded
        fraction = simulate(self._plan, durations.__getitem__).bubble_fraction
        self._saved_s = started - time.perf_counter()
        return fraction


def _bubble_fraction(ranks: Sequence[RankTimes], num_stages: int) -> float | None:
    num_pipelines = len(ranks) // num_stages
    pipelines = [ranks[place::num_pipelines] for place in range(num_pipelines)]
    available = [num_stages * max(rank.makespan for rank in pipeline) for pipeline in pipelines]
    if not all(available):
        return None
    idle = [
        1 - sum(rank.busy for rank in pipeline) / whole for pipeline, whole in zip(pipelines, available, strict=True)
    ]
    return sum(idle) / num_pipelines
