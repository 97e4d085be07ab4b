"""A pipeline schedule as data: for each stage, the list of actions that it runs, in order.

The kinds of work on one micro-batch:
  F  run the stage's layers; keep the output and the hidden state at each of the stage's exits
  X  run the stage's exit heads, their losses, and the backward pass of the heads only
  B  receive the gradient of the output, and run the backward pass of the layers
  W  add up the gradients of the layers' matrices, from what B left; in plans without any, B does that too
X is apart from B so that it can run after the output has been sent and before the gradient has arrived; W, so that the
gradient of the input can be sent before it.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal


class Kind(StrEnum):
    """What an action does. Sends return at once; a receive waits for the message."""

    F = "F"
    X = "X"
    B = "B"
    W = "W"
    SEND_FORWARD = "send_forward"
    RECV_FORWARD = "recv_forward"
    SEND_BACKWARD = "send_backward"
    RECV_BACKWARD = "recv_backward"


WORK = (Kind.F, Kind.X, Kind.B, Kind.W)
"""What takes a stage's time; the other kinds are messages."""


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a plan. `chunk` counts the model chunks of a stage (1 chunk unless the schedule is interleaved)."""

    kind: Kind
    stage: int
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{self.kind}{self.microbatch}{chunk}@{self.stage}"


@dataclass(frozen=True, slots=True)
class Fill:
    """An extra micro-batch in time that a schedule would leave idle, with gradients on some of the stages only.

    "warmup": runs F from the first stage to `stage`, turns round there, with the loss of that stage's exits as its
    last, and runs B back to the first stage; X wherever it passes exits.
    "cooldown": runs F on all stages, and X and B from the last stage back to `stage`; on the stages before, its F
    keeps nothing.
    """

    kind: Literal["warmup", "cooldown"]
    stage: int

    def runs_forward(self, stage: int) -> bool:
        """Whether a stage runs F of it."""
        return self.kind == "cooldown" or stage <= self.stage

    def trains(self, stage: int) -> bool:
        """Whether a stage runs B of it, and X if it has exits."""
        return stage >= self.stage if self.kind == "cooldown" else stage <= self.stage


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole pipeline's step: `actions[stage]` is what that stage runs, sends and receives included.

    Attributes:
        num_microbatches: all of them: the regular ones, 0 and up, and then `fills`, in order.
        num_idle: the last stages, which have no actions: nothing of what runs is theirs.
    """

    schedule: str
    num_stages: int
    num_chunks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    fills: tuple[Fill, ...] = ()
    num_idle: int = 0

    @property
    def num_working(self) -> int:
        """Stages that every micro-batch goes through."""
        return self.num_stages - self.num_idle

    @property
    def num_regular(self) -> int:
        """Micro-batches that all stages work on in full."""
        return self.num_microbatches - len(self.fills)

    def fill_of(self, microbatch: int) -> Fill | None:
        """What a micro-batch is as a fill; None for a regular one."""
        return self.fills[microbatch - self.num_regular] if microbatch >= self.num_regular else None

    def predecessor(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """(stage, chunk) that computes the input of this one; None where the tokens enter."""
        if stage > 0:
            return stage - 1, chunk
        return (self.num_working - 1, chunk - 1) if chunk > 0 else None

    def successor(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """(stage, chunk) that computes on the output of this one; None where the last exit is."""
        if stage < self.num_working - 1:
            return stage + 1, chunk
        return (0, chunk + 1) if chunk < self.num_chunks - 1 else None


def make_plan(
    schedule: str,
    num_microbatches: int,
    work: Sequence[Sequence[Action]],
    *,
    num_chunks: int = 1,
    fills: tuple[Fill, ...] = (),
    num_idle: int = 0,
) -> Plan:
    """A plan from each stage's work: a receive goes before the F or B that needs it, a send right after its F or B.

    An output or a gradient is sent only where the neighbour works on it. Neighbours that take the same messages in
    different orders make no valid plan: links keep their order.

    Args:
        num_microbatches: all of them, the fills included.
        work: `work[stage]` is that stage's list of F, X, B and W actions.
        num_idle: how many stages come after those of `work`.
    """
    lanes = (*(tuple(actions) for actions in work), *((),) * num_idle)
    bare = Plan(schedule, len(lanes), num_chunks, num_microbatches, lanes, fills, num_idle)
    planned = {action for actions in bare.actions for action in actions if action.kind is not Kind.X}
    complete = tuple(
        tuple(step for action in actions for step in _with_transfers(bare, planned, action)) for actions in bare.actions
    )
    return replace(bare, actions=complete)


def _with_transfers(plan: Plan, planned: Set[Action], action: Action) -> list[Action]:
    def beside(kind: Kind) -> Action:
        return Action(kind, action.stage, action.chunk, action.microbatch)

    def works(place: tuple[int, int] | None) -> bool:
        return place is not None and Action(action.kind, *place, action.microbatch) in planned

    if action.kind in (Kind.X, Kind.W):
        return [action]
    predecessor, successor = (neighbour(action.stage, action.chunk) for neighbour in (plan.predecessor, plan.successor))
    if action.kind is Kind.F:
        before = Kind.RECV_FORWARD if predecessor is not None else None
        after = Kind.SEND_FORWARD if works(successor) else None
    else:
        before = Kind.RECV_BACKWARD if works(successor) else None
        after = Kind.SEND_BACKWARD if works(predecessor) else None
    return [*([beside(before)] if before else []), action, *([beside(after)] if after else [])]
