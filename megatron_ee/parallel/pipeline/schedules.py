"""Pipeline schedules: pure functions that give each stage its F, B and W in order, and one rule for where X goes.

A new schedule is one more function in TRAINING_SCHEDULES; all share the passes that put in exits and transfers.

**Where X goes**: see `exits.py`.

**Length of a step**, F_s, X_s, B_s being the durations on stage s, and `last` = P - 1, without transfer time:

  T >= sum_s(F_s + B_s) + X_last + (M-1) (F_last + X_last + B_last)
  T <= sum_s(F_s + B_s) + X_last + (M-1) (max_s F_s + max_s X_s + max_s B_s)   if each exit fits into its first wait,
                                                                 X_s <= sum_{r>s}(F_r + B_r) + X_last

for gpipe and 1f1b, any P and M, exits on any stages: equalities where the last stage is the slowest in F, in X and in
B. With X inside F and B (fused) put X = 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_ee.parallel.pipeline.exits import place_exits
from megatron_ee.parallel.pipeline.fills import check_fills, filled_lanes, turning_at
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan, make_plan


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a schedule is made for.

    Attributes:
        num_microbatches: the regular ones.
        has_exits: for each chunk of each stage, in the model's order, whether it has an exit head; the last one has the
            final exit's.
        fills: micro-batches beside the regular ones, for filled-1f1b.
    """

    num_stages: int
    num_microbatches: int
    has_exits: tuple[bool, ...]
    num_chunks: int = 1
    fills: tuple[Fill, ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_stages, self.num_chunks, self.num_microbatches) < 1:
            raise ValueError(
                f"a pipeline needs a stage, a chunk and a micro-batch at least, not {self.num_stages} stages, "
                f"{self.num_chunks} chunks and {self.num_microbatches} micro-batches"
            )
        if len(self.has_exits) != self.num_stages * self.num_chunks:
            raise ValueError(
                f"has_exits has {len(self.has_exits)} entries for {self.num_stages} stages of {self.num_chunks} chunks"
            )
        if not self.has_exits[-1]:
            raise ValueError("the last stage has no exit: the final output is an exit too")
        check_fills(self.num_stages, self.num_chunks, self.has_exits, self.fills)


Schedule = Callable[[Pipeline, int], list[Action]]
"""The F and B actions of one stage, and W where it is apart from B, in order."""


def build_plan(
    schedule: str,
    *,
    num_stages: int,
    num_microbatches: int,
    has_exits: Sequence[bool],
    num_chunks: int = 1,
    more_schedules: Mapping[str, Schedule] | None = None,
    fills: Sequence[Fill] = (),
    release_exits: bool = False,
    num_idle: int = 0,
) -> Plan:
    """The plan of one step: the named schedule's work, with exits and transfers put in.

    Args:
        schedule: a key of SCHEDULES or of `more_schedules`.
        num_microbatches: the regular ones; the plan numbers the fills after them.
        has_exits: see `Pipeline`.
        fills: for filled-1f1b; `plan_fills` finds those that cost no time.
        num_idle: stages after `num_stages` which have nothing to do.
        release_exits: run each X just before its own B, so that a micro-batch that waits for its gradient holds none
            of its exits': less memory, and less time hidden.

    Raises:
        ValueError: the schedule is unknown or has no place for fills, or the pipeline makes no sense.
    """
    schedules = {**SCHEDULES, **(more_schedules or {})}
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(schedules)}")
    if fills and schedule != "filled-1f1b":
        raise ValueError(f"fills are for filled-1f1b, not for {schedule}")
    pipeline = Pipeline(num_stages, num_microbatches, tuple(has_exits), num_chunks, tuple(fills))
    work = [
        _put_exits(pipeline, stage, schedules[schedule](pipeline, stage), release=release_exits)
        for stage in range(num_stages)
    ]
    return make_plan(
        schedule, num_microbatches + len(fills), work, num_chunks=num_chunks, fills=tuple(fills), num_idle=num_idle
    )


def gpipe(pipeline: Pipeline, stage: int) -> list[Action]:
    """Every forward, then every backward; all M micro-batches live at once (GPipe: Huang et al. 2019)."""
    microbatches = range(pipeline.num_microbatches)
    return [_forward(stage, i) for i in microbatches] + [_backward(stage, i) for i in microbatches]


def one_forward_one_backward(pipeline: Pipeline, stage: int) -> list[Action]:
    """1F1B: P - 1 - s forwards, then a forward and a backward in turn; min(P - s, M) micro-batches live on stage s.

    PipeDream-flush, Narayanan et al. 2021.
    """
    num_microbatches = pipeline.num_microbatches
    num_warmup = min(pipeline.num_stages - 1 - stage, num_microbatches)
    warmup = [_forward(stage, i) for i in range(num_warmup)]
    steady = [
        step
        for i in range(num_microbatches - num_warmup)
        for step in (_forward(stage, num_warmup + i), _backward(stage, i))
    ]
    cooldown = [_backward(stage, i) for i in range(num_microbatches - num_warmup, num_microbatches)]
    return warmup + steady + cooldown


def filled_one_forward_one_backward(pipeline: Pipeline, stage: int) -> list[Action]:
    """1F1B, and the pipeline's fills in the time that it leaves idle: see `fills.py`. Without fills it is 1F1B."""
    lane = filled_lanes(pipeline.num_stages, pipeline.num_microbatches, pipeline.fills)[stage]
    return [Action(kind, stage, 0, i) for kind, i in lane]


def zero_bubble(pipeline: Pipeline, stage: int) -> list[Action]:
    """1F1B whose gradients of weights come later, in time that stages wait for gradients (ZB-H1: Qi et al. 2024).

    W of a micro-batch stands s backwards after its own B on stage s, so that the last gradient leaves the last stage
    before P - 1 of its W's. F and B end no later than with 1F1B, for any durations that are equal for all micro-batches
    of a stage; only up to s W's at the end can make a step longer, and do so where W takes much longer on a late stage,
    which waits for a slow forward, than on others. With equal stages, X = 0, W <= F, W <= B and M >= P, every stage
    idles for (P - 1) (F + B - W) instead of (P - 1) (F + B + W); for all F, B, W and M the length is

      T = M (F + B + W) + (P - 1) (F + B) - min(P - 1, M - 1) min(F, B, W)

    **Memory.** Stage s holds min(P - s, M) micro-batches up to their B, as 1F1B does. With those that wait for their W,
    and hold no more than the matrices' inputs and their outputs' gradients, it has min(P, M) at most: what 1F1B holds
    on the first stage, but more than 1F1B holds on the others.
    """
    steps: list[Action] = []
    waiting: list[Action] = []
    for action in one_forward_one_backward(pipeline, stage):
        steps.append(action)
        if action.kind is Kind.B:
            waiting.append(Action(Kind.W, stage, 0, action.microbatch))
            if len(waiting) > stage:
                steps.append(waiting.pop(0))
    return steps + waiting


def interleaved(pipeline: Pipeline, stage: int) -> list[Action]:
    """1F1B over several chunks a stage, which divides the bubble by their number (Narayanan et al. 2021, section 2.2).

    Micro-batches go round in groups of P: a stage runs a group through its first chunk, then through its second, and so
    on; backward in the reverse order of chunks. M must be a multiple of P: a smaller last group can deadlock.
    """
    forwards = _in_rounds(pipeline, stage, Kind.F)
    backwards = _in_rounds(pipeline, stage, Kind.B)
    first_backward_at = 2 * (pipeline.num_stages - 1 - stage) + (pipeline.num_chunks - 1) * pipeline.num_stages
    num_warmup = min(first_backward_at, len(forwards))
    steady = zip(forwards[num_warmup:], backwards, strict=False)
    cooldown = backwards[len(forwards) - num_warmup :]
    return forwards[:num_warmup] + [action for pair in steady for action in pair] + cooldown


def forward_only(pipeline: Pipeline, stage: int) -> list[Action]:
    """Forwards and exits, for validation, and for the training of exits alone."""
    return _in_rounds(pipeline, stage, Kind.F)


TRAINING_SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "filled-1f1b": filled_one_forward_one_backward,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
}

SCHEDULES: Mapping[str, Schedule] = {**TRAINING_SCHEDULES, "forward-only": forward_only}


def _in_rounds(pipeline: Pipeline, stage: int, kind: Kind) -> list[Action]:
    """A stage's forwards or backwards: as many micro-batches as there are stages through one chunk after the other."""
    chunks = range(pipeline.num_chunks) if kind is Kind.F else reversed(range(pipeline.num_chunks))
    microbatches = range(pipeline.num_microbatches)
    groups = [microbatches[first : first + pipeline.num_stages] for first in microbatches[:: pipeline.num_stages]]
    return [Action(kind, stage, chunk, i) for group, chunk in product(groups, list(chunks)) for i in group]


def _put_exits(pipeline: Pipeline, stage: int, work: list[Action], *, release: bool) -> list[Action]:
    """`work` with an X for each F of a chunk that has exits; a fill has none where it isn't trained."""
    num_regular, fills = pipeline.num_microbatches, dict(enumerate(pipeline.fills, start=pipeline.num_microbatches))
    steps = [(action.kind, (action.chunk, action.microbatch)) for action in work]
    with_exits = {
        (chunk, i)
        for kind, (chunk, i) in steps
        if pipeline.has_exits[chunk * pipeline.num_stages + stage] and (i not in fills or fills[i].trains(stage))
    }
    wait_for_none = {(0, i) for i in turning_at(stage, num_regular, pipeline.fills)}
    if stage == pipeline.num_stages - 1:
        wait_for_none |= {(chunk, i) for kind, (chunk, i) in steps if chunk == pipeline.num_chunks - 1}
    placed = place_exits(steps, with_exits=with_exits, wait_for_none=wait_for_none, release=release)
    return [Action(kind, stage, chunk, i) for kind, (chunk, i) in placed]


def _forward(stage: int, microbatch: int) -> Action:
    return Action(Kind.F, stage, 0, microbatch)


def _backward(stage: int, microbatch: int) -> Action:
    return Action(Kind.B, stage, 0, microbatch)
