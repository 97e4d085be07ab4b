"""Prove a plan valid and free of deadlock, and find how long it takes, without running anything.

The model is that of the runtime: a stage runs its actions in order; a send costs its stage nothing and the message
arrives `transfer` later; a receive waits for its message; each link keeps its order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.timeline import Span, Timeline
from megatron_ee.parallel.pipeline.validity import InvalidPlanError, check_rules, receive_of

__all__ = ["Cost", "DeadlockError", "InvalidPlanError", "StageCosts", "check", "simulate"]

Cost = Callable[[Action], float]


class DeadlockError(InvalidPlanError):
    """Stages that wait for each other. `waiting`: the receive that each stuck stage stands at."""

    def __init__(self, waiting: tuple[Action, ...]) -> None:
        self.waiting = waiting
        super().__init__("deadlock: " + ", ".join(f"stage {action.stage} waits at {action}" for action in waiting))


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Durations of F, X, B and W on each stage, equal for all micro-batches, fills included, in any unit of time.

    Attributes:
        backward: without W where there is any.
        weight: for plans with W.
    """

    forward: tuple[float, ...]
    exit: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...] | None = None

    def __call__(self, action: Action) -> float:
        durations = {Kind.F: self.forward, Kind.X: self.exit, Kind.B: self.backward, Kind.W: self.weight}[action.kind]
        assert durations is not None, f"{action} has no duration"
        return durations[action.stage]


def simulate(plan: Plan, cost: Cost, *, transfer: float = 0.0) -> Timeline:
    """The timeline of a plan.

    Args:
        cost: duration of an F, X, B or W action, >= 0.
        transfer: time from a send to the arrival of its message, in the same unit, >= 0.

    Raises:
        InvalidPlanError: the plan breaks a rule; the message names the action.
        DeadlockError: stages wait for each other.
        ValueError: a negative duration.
    """
    if not transfer >= 0:
        raise ValueError(f"a transfer takes {transfer}")
    check_rules(plan)
    return _run(plan, cost, transfer)


def check(plan: Plan) -> None:
    """Raise InvalidPlanError or DeadlockError unless the plan can be run and computes the step."""
    simulate(plan, lambda action: 0.0)


def _run(plan: Plan, cost: Cost, transfer: float) -> Timeline:
    """Let every stage go as far as it can, in turn, until all are done or none gets any further."""
    arrivals: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in plan.actions]
    lanes = [_lane(plan, stage, cost, transfer, arrivals, spans[stage]) for stage in range(plan.num_stages)]
    waiting = [next(lane, None) for lane in lanes]
    while any(waiting):
        still_waiting = [next(lane, None) for lane in lanes]
        if still_waiting == waiting:
            raise DeadlockError(tuple(action for action in waiting if action))
        waiting = still_waiting
    return Timeline(plan.schedule, tuple(tuple(lane) for lane in spans), plan.num_regular)


def _lane(
    plan: Plan, stage: int, cost: Cost, transfer: float, arrivals: dict[Action, float], spans: list[Span]
) -> Iterator[Action]:
    """Run one stage; yields the receive that it stands at for as long as the message has not been sent."""
    now = 0.0
    for action in plan.actions[stage]:
        match action.kind:
            case Kind.RECV_FORWARD | Kind.RECV_BACKWARD:
                while action not in arrivals:
                    yield action
                now = max(now, arrivals[action])
            case Kind.SEND_FORWARD | Kind.SEND_BACKWARD:
                arrivals[receive_of(plan, action)] = now + transfer
            case _:
                duration = cost(action)
                if not duration >= 0:
                    raise ValueError(f"{action} takes {duration}")
                spans.append(Span(action, now, now + duration))
                now += duration
