"""Where the time of a step goes, on every rank.

Everything within a step belongs to a phase:

    rank_wait   until the slowest rank has ended the step before, and has logged it
    data        the batch
    prepare     its tokens counted, gradients set to zero
    forward, exits, backward, weights   F, X, B and W of the plan; B with what it computes again, and with sums of
                gradients as far as it starts them
    p2p_wait    the rest of the pipeline's time: the stage waits for its neighbours, or hands over to them
    grad_sync   the sums of gradients, or what is left of them where they overlap B
    optimizer   the norm, clipping and the update

megatron-core's schedules show no actions: there, `forward_backward` is all of the pipeline's time. `checkpoint` comes
between steps, and lasts until all ranks have saved.

Times are the device's, and nothing is synchronised for their sake: on CUDA an F lasts as long as its kernels on the
stream, and a wait as long as the stream stood still. They are read a step later, when they have passed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.profiler import record_function

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.pipeline.plan import WORK, Action, Plan
from megatron_ee.parallel.pipeline.runtime import ActionWatch
from megatron_ee.training.observation.step_times import PHASE_OF, PHASES, PlannedBubble, RankTimes, StepTimes

_STEP, _PIPELINE = "step", "pipeline"
_BETWEEN_STEPS = ("rank_wait", "checkpoint")
_MOST_UNREAD = 2  # steps; whoever adds a third waits for the first


@dataclass(slots=True)
class _Marks:
    """On the device's clock: a step's, and of what came between it and the step before."""

    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)  # begin and end of each action of the plan, in order


@dataclass(slots=True)
class _Sums:
    """Seconds over some steps: by span, and of each action of the plan."""

    spans: dict[str, float]
    actions: list[float]
    num_steps: int = 0
    makespan: float = 0.0


class PhaseTimer:
    """Times this rank's phases, and gives all ranks' on demand. It is what watches the pipeline's actions.

    Args:
        plan: of every step; None: the runtime shows no actions.

    Attributes:
        tell: is told of each phase that begins.
    """

    def __init__(self, mesh: Mesh, plan: Plan | None) -> None:
        self._mesh, self._plan, self._clock = mesh, plan, mesh.device.clock()
        self._actions = plan.actions[mesh.pipeline_rank] if plan else ()
        self._last_work = max((place for place, action in enumerate(self._actions) if action.kind in WORK), default=0)
        self._planned_bubble = PlannedBubble(plan) if plan and mesh.is_main and mesh.pipeline_size > 1 else None
        self._marks, self._unread = _Marks(), deque[_Marks]()
        self._sums = self._zero()
        self._has_begun = self._is_stepping = False
        self.tell: Callable[[str], None] = lambda phase: None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that a training step needs."""
        self._has_begun = self._is_stepping = True
        with self._span(_STEP):
            yield
        self._is_stepping = False
        self._unread.append(self._marks)
        self._marks = _Marks()
        while self._unread and (len(self._unread) > _MOST_UNREAD or self._has_passed(self._unread[0])):
            self._read_step()

    @contextmanager
    def rank_wait(self) -> Iterator[None]:
        """Around the wait for all ranks before a step. After a phase between steps it is a part of that one: the main
        rank has more to save. The first doesn't count: some ranks take longer to be built."""
        name = self._marks.spans[-1][0] if self._marks.spans else "rank_wait"
        with self.phase(name) if self._has_begun else nullcontext():
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step, or `checkpoint`. In a profile it is a range of this name."""
        self.tell(name)
        with record_function(name), self._span(name):
            yield

    @contextmanager
    def pipeline(self) -> Iterator[Sequence[ActionWatch]]:
        """Around the run of the plan; gives what has to watch it."""
        with self.phase(_PIPELINE):
            yield (self,) if self._actions and self._is_stepping else ()

    def begin(self, action: Action) -> None:
        self._marks.actions.append(self._clock.mark())

    def end(self, action: Action) -> None:
        self._marks.actions.append(self._clock.mark())

    def read(self) -> StepTimes:
        """Of the steps since the last read, of which there is at least one. Collective."""
        while self._unread:
            self._read_step()
        num_steps = self._sums.num_steps
        ranks, durations_s = self._gather(self._own_times())
        times = StepTimes.of(ranks, num_steps=num_steps, num_stages=self._mesh.pipeline_size)
        if self._planned_bubble is not None:
            planned = self._planned_bubble.fraction(durations_s, elapsed_s=times.step_s * num_steps)
            times = replace(times, planned_bubble_fraction=planned)
        self._sums = self._zero()
        return times

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        if not (self._is_stepping or name in _BETWEEN_STEPS):
            yield  # a part of a step on its own, as benches run them
            return
        begin = self._clock.mark()
        yield
        self._marks.spans.append((name, begin, self._clock.mark()))

    def _has_passed(self, marks: _Marks) -> bool:
        _, _, end = marks.spans[-1]
        return self._clock.has_passed(end)

    def _read_step(self) -> None:
        """Add the first unread step to the sums."""
        marks, clock, sums = self._unread.popleft(), self._clock, self._sums
        _, _, end_of_step = marks.spans[-1]
        clock.wait(end_of_step)
        for name, begin, end in marks.spans:
            sums.spans[name] += clock.seconds(begin, end)
            clock.release((begin, end))
        begins, ends = marks.actions[::2], marks.actions[1::2]
        for place, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            sums.actions[place] += clock.seconds(begin, end)
        if begins:
            sums.makespan += clock.seconds(begins[0], ends[self._last_work])
        clock.release(marks.actions)
        sums.num_steps += 1

    def _zero(self) -> _Sums:
        return _Sums(dict.fromkeys((*PHASES, _STEP, _PIPELINE), 0.0), [0.0] * len(self._actions))

    def _own_times(self) -> RankTimes:
        sums = self._sums
        seconds = dict(sums.spans)
        for action, of_action in zip(self._actions, sums.actions, strict=True):
            if action.kind in PHASE_OF:
                seconds[PHASE_OF[action.kind]] += of_action
        rest = seconds[_PIPELINE] - sum(seconds[phase] for phase in PHASE_OF.values())
        seconds["p2p_wait" if self._plan else "forward_backward"] = max(0.0, rest)  # events are rounded
        phases = tuple(seconds[phase] for phase in PHASES)
        return RankTimes(phases, step=seconds[_STEP] + seconds["rank_wait"], makespan=sums.makespan)

    def _gather(self, own: RankTimes) -> tuple[list[RankTimes], list[list[float]]]:
        """Of all ranks; and how long each stage's actions take in a step, as means over its ranks."""
        mesh, row = self._mesh, (own.step, own.makespan, *own.phases)
        most = max(map(len, self._plan.actions)) if self._plan else 0
        by_rank = torch.zeros(mesh.world_size, len(row), dtype=torch.float64)
        by_rank[mesh.rank] = torch.tensor(row, dtype=torch.float64)
        by_action = torch.zeros(mesh.pipeline_size, most, dtype=torch.float64)
        by_action[mesh.pipeline_rank, : len(self._actions)] = torch.tensor(self._sums.actions, dtype=torch.float64)
        together = torch.cat([by_rank.flatten(), by_action.flatten()]).to(mesh.device.torch)
        sums_by_rank, sums_by_action = torch.tensor_split(mesh.sum_over_ranks(together), [by_rank.numel()])
        steps_and_ranks = self._sums.num_steps * mesh.data_size * mesh.tensor_size
        ranks = [
            RankTimes(tuple(phases), step, makespan)
            for step, makespan, *phases in sums_by_rank.view_as(by_rank).tolist()
        ]
        return ranks, (sums_by_action.view_as(by_action) / steps_and_ranks).tolist()
