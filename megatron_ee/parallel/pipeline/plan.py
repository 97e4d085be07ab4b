"""A pipeline schedule as data: for each stage, the list of actions that it runs, in order.

The kinds of work on one micro-batch:
  F  run the stage's layers; keep the output and the hidden state at each of the stage's exits
  X  run the stage's exit heads, their losses, and the backward pass of the heads only
  B  receive the gradient of the output, and run the backward pass of the layers
X is apart from B so that it can run after the output has been sent and before the gradient has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does. Sends return at once; a receive waits for the message."""

    F = "F"
    X = "X"
    B = "B"
    SEND_FORWARD = "send_forward"
    RECV_FORWARD = "recv_forward"
    SEND_BACKWARD = "send_backward"
    RECV_BACKWARD = "recv_backward"


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
class Plan:
    """The whole pipeline's step: `actions[stage]` is what that stage runs, sends and receives included."""

    schedule: str
    num_stages: int
    num_chunks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def predecessor(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """(stage, chunk) that computes the input of this one; None where the tokens enter."""
        if stage > 0:
            return stage - 1, chunk
        return (self.num_stages - 1, chunk - 1) if chunk > 0 else None

    def successor(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """(stage, chunk) that computes on the output of this one; None where the final exit is."""
        if stage < self.num_stages - 1:
            return stage + 1, chunk
        return (0, chunk + 1) if chunk < self.num_chunks - 1 else None


def make_plan(schedule: str, num_microbatches: int, work: Sequence[Sequence[Action]], *, num_chunks: int = 1) -> Plan:
    """A plan from each stage's F, X and B: a receive goes before the work that needs it, a send right after its F or B.

    Args:
        work: `work[stage]` is that stage's list of F, X and B actions.
    """
    bare = Plan(schedule, len(work), num_chunks, num_microbatches, tuple(tuple(actions) for actions in work))
    complete = tuple(
        tuple(step for action in actions for step in _with_transfers(bare, action)) for actions in bare.actions
    )
    return Plan(schedule, bare.num_stages, num_chunks, num_microbatches, complete)


def _with_transfers(plan: Plan, action: Action) -> list[Action]:
    def beside(kind: Kind) -> Action:
        return Action(kind, action.stage, action.chunk, action.microbatch)

    has_predecessor = plan.predecessor(action.stage, action.chunk) is not None
    has_successor = plan.successor(action.stage, action.chunk) is not None
    if action.kind is Kind.F:
        before, after = has_predecessor and Kind.RECV_FORWARD, has_successor and Kind.SEND_FORWARD
    elif action.kind is Kind.B:
        before, after = has_successor and Kind.RECV_BACKWARD, has_predecessor and Kind.SEND_BACKWARD
    else:
        before = after = False
    return [*([beside(before)] if before else []), action, *([beside(after)] if after else [])]
