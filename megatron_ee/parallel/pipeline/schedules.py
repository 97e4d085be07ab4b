"""Pipeline schedules: pure functions that give each stage its F and B in order, and one rule for where X goes.

A new schedule is one more function in TRAINING_SCHEDULES; all share the passes that put in exits and transfers.

**Where X goes.** On a stage that waits for gradients, the exits of all micro-batches that have run forward run just
before the next such wait: after a run of forwards, so that none of its outputs leaves later for them, and before the
gradient is needed. After warm-up, 1F1B then reads F, send, X, receive, B. Compared by simulation with X right after
each F and with X just before its own B (1F1B, P = 8, M = 16, F = 1, B = 2, X = 3h on every stage, transfer 0.05;
each duration times a log-normal factor, sigma 0.1; step time over the same pipeline without early exits, mean of 100):

                         h = .25     .5      1      2
  before the next wait     1.010  1.003  1.003  1.009
  right after each F       1.010  1.004  1.004  1.013
  just before its own B    1.011  1.008  1.013  1.025

Without the jitter all three are 1.000. With none, one or two such exits on each early stage (1,500 draws, no jitter)
the first is the fastest of the three in every draw; the third is 1.4 % slower on average and 15 % at worst, because the
wait of the warm-up goes unused and the exits left over delay gradients in the cool-down. Under GPipe, X right after F
holds up the later stages: 21 % slower on average.

A chunk that waits for no gradient has nothing to hide X in. The last one runs X just before its own B, so that the
first gradient leaves early; without any B, X follows its F, so that one micro-batch's hidden states are kept at a time.
(EE-LLM, Chen et al. 2023, runs the exits' backward in B, after the wait.)

**Length of a step**, F_s, X_s, B_s being the durations on stage s, and `last` = P - 1, without transfer time:

  T >= sum_s(F_s + B_s) + X_last + (M-1) (F_last + X_last + B_last)
  T <= sum_s(F_s + B_s) + X_last + (M-1) (max_s F_s + max_s X_s + max_s B_s)   if each exit fits into its first wait,
                                                                 X_s <= sum_{r>s}(F_r + B_r) + X_last

for gpipe and 1f1b, any P and M, exits on any stages: equalities where the last stage is the slowest in F, in X and in
B. With X inside F and B (fused) put X = 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan, make_plan


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a schedule is made for.

    Attributes:
        has_exits: for each chunk of each stage, in the model's order, whether it has an exit head; the last one has the
            final exit's.
    """

    num_stages: int
    num_microbatches: int
    has_exits: tuple[bool, ...]
    num_chunks: int = 1

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


Schedule = Callable[[Pipeline, int], list[Action]]
"""The F and B actions of one stage, in order."""


def build_plan(
    schedule: str,
    *,
    num_stages: int,
    num_microbatches: int,
    has_exits: Sequence[bool],
    num_chunks: int = 1,
    more_schedules: Mapping[str, Schedule] | None = None,
) -> Plan:
    """The plan of one step: the named schedule's F and B, with exits and transfers put in.

    Args:
        schedule: a key of SCHEDULES or of `more_schedules`.
        has_exits: see `Pipeline`.

    Raises:
        ValueError: the schedule is unknown, or the pipeline makes no sense.
    """
    schedules = {**SCHEDULES, **(more_schedules or {})}
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(schedules)}")
    pipeline = Pipeline(num_stages, num_microbatches, tuple(has_exits), num_chunks)
    work = [_put_exits(pipeline, stage, schedules[schedule](pipeline, stage)) for stage in range(num_stages)]
    return make_plan(schedule, num_microbatches, work, num_chunks=num_chunks)


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
    """Forwards and exits without gradients, for validation."""
    return _in_rounds(pipeline, stage, Kind.F)


TRAINING_SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
}

SCHEDULES: Mapping[str, Schedule] = {**TRAINING_SCHEDULES, "forward-only": forward_only}


def _in_rounds(pipeline: Pipeline, stage: int, kind: Kind) -> list[Action]:
    """A stage's forwards or backwards: as many micro-batches as there are stages through one chunk after the other."""
    chunks = range(pipeline.num_chunks) if kind is Kind.F else reversed(range(pipeline.num_chunks))
    microbatches = range(pipeline.num_microbatches)
    groups = [microbatches[first : first + pipeline.num_stages] for first in microbatches[:: pipeline.num_stages]]
    return [Action(kind, stage, chunk, i) for group, chunk in product(groups, list(chunks)) for i in group]


def _put_exits(pipeline: Pipeline, stage: int, work: list[Action]) -> list[Action]:
    """`work` with an X for each F of a chunk that has exits, where the module's docstring says."""
    waits_for_none = (pipeline.num_stages - 1, pipeline.num_chunks - 1)
    with_backward = {replace(action, kind=Kind.X) for action in work if action.kind is Kind.B}
    placed: list[Action] = []
    pending: list[Action] = []
    for action in work:
        exits = replace(action, kind=Kind.X)
        if action.kind is Kind.B:
            waits = (stage, action.chunk) != waits_for_none
            due = [exits] if not waits else [x for x in pending if (stage, x.chunk) != waits_for_none]
            placed += due
            pending = [x for x in pending if x not in due]
        placed.append(action)
        if action.kind is Kind.F and pipeline.has_exits[action.chunk * pipeline.num_stages + stage]:
            (pending if exits in with_backward else placed).append(exits)
    return placed


def _forward(stage: int, microbatch: int) -> Action:
    return Action(Kind.F, stage, 0, microbatch)


def _backward(stage: int, microbatch: int) -> Action:
    return Action(Kind.B, stage, 0, microbatch)
