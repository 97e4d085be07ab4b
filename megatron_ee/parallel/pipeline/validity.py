"""The rules that a plan has to keep before it makes sense to run it, in whatever order its stages take turns."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan


class InvalidPlanError(ValueError):
    """A plan that cannot be run, or would not compute the step."""


def check_rules(plan: Plan) -> None:
    """Raise InvalidPlanError, which names the action, unless the plan keeps all of these rules.

    - An action stands on its own stage, once.
    - F stands after its input's receive, X after F, B after F and X and the gradient's receive, a send after its work.
    - Every micro-batch enters at the first stage, and what is received is worked on.
    - W stands after B; if there is any W, every B has its own.
    - If there is any B, a micro-batch that goes no deeper turns round with a B; if there is none, exits see every F.
    - A regular micro-batch is worked on everywhere but on idle stages, a fill exactly where its kind and its stage say.
    - Over each link (see `link_of`) all that is sent is received, in the same order.
    """
    rules = _Rules(plan)
    rules.check_stages()
    rules.check_completeness()
    rules.check_links()
    rules.check_reach()


class Link(NamedTuple):
    """What keeps its order: messages of one kind to one stage."""

    kind: Kind
    stage: int
    wraps: bool


def receive_of(plan: Plan, send: Action) -> Action:
    """The receive at the other end of a send."""
    forward = send.kind is Kind.SEND_FORWARD
    other_end = (plan.successor if forward else plan.predecessor)(send.stage, send.chunk)
    assert other_end is not None, f"{send} has no stage at its other end"
    return Action(Kind.RECV_FORWARD if forward else Kind.RECV_BACKWARD, *other_end, send.microbatch)


def link_of(receive: Action, plan: Plan) -> Link:
    """The link of a message: to one stage, in one direction. The way round from the last stage to the first, and back,
    is a link of its own: with two stages it would be one with the way between neighbours."""
    neighbour = plan.predecessor if receive.kind is Kind.RECV_FORWARD else plan.successor
    other_end = neighbour(receive.stage, receive.chunk)
    assert other_end is not None, f"{receive} has no stage at its other end"
    return Link(receive.kind, receive.stage, wraps=other_end[1] != receive.chunk)


class _Rules:
    def __init__(self, plan: Plan) -> None:
        if len(plan.actions) != plan.num_stages:
            raise InvalidPlanError(f"actions for {len(plan.actions)} stages in a plan of {plan.num_stages}")
        self.plan = plan
        self.all = [action for actions in plan.actions for action in actions]
        self.planned = set(self.all)
        self.exits = {(action.stage, action.chunk) for action in self.all if action.kind is Kind.X}
        self.has_backward = any(action.kind is Kind.B for action in self.all)
        self.has_weights = any(action.kind is Kind.W for action in self.all)

    def check_stages(self) -> None:
        for stage, actions in enumerate(self.plan.actions):
            done: set[Action] = set()
            for action in actions:
                self._check_place(stage, action)
                if action in done:
                    raise InvalidPlanError(f"{action} is there twice")
                for needed in self._needed_before(action):
                    if needed not in done:
                        raise InvalidPlanError(f"{action} has no {needed} before it")
                done.add(action)

    def check_completeness(self) -> None:
        for microbatch in range(self.plan.num_microbatches):
            self._check_planned(Action(Kind.F, 0, 0, microbatch), "every micro-batch enters at the first stage")
        for action in self.all:
            for needed in self._needed_somewhere(action):
                self._check_planned(needed, f"{action} asks for it")

    def check_links(self) -> None:
        sent: dict[Link, list[Action]] = {}
        received: dict[Link, list[Action]] = {}
        for action in self.all:
            if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                receive = receive_of(self.plan, action)
                self._check_planned(receive, f"{action} sends to it")
                sent.setdefault(link_of(receive, self.plan), []).append(receive)
            elif action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
                received.setdefault(link_of(action, self.plan), []).append(action)
        for link, receives in received.items():
            _check_link(sent.get(link, []), receives)

    def check_reach(self) -> None:
        plan = self.plan
        places = product(range(plan.num_working), range(plan.num_chunks), range(plan.num_microbatches))
        for stage, chunk, microbatch in places:
            fill = plan.fill_of(microbatch)
            trains = self.has_backward and (fill is None or fill.trains(stage))
            belongs = {Kind.F: fill is None or fill.runs_forward(stage), Kind.B: trains}
            for kind, does in belongs.items():
                action = Action(kind, stage, chunk, microbatch)
                if does:
                    self._check_planned(action, f"micro-batch {microbatch} is for this stage too")
                elif action in self.planned:
                    raise InvalidPlanError(f"{action} has no place on this stage: {fill}")
            exits = Action(Kind.X, stage, chunk, microbatch)
            if self.has_backward and not trains and exits in self.planned:
                raise InvalidPlanError(f"{exits} has no place on this stage: {fill}")

    def _check_place(self, stage: int, action: Action) -> None:
        plan = self.plan
        if stage >= plan.num_working:
            raise InvalidPlanError(f"{action} stands on stage {stage}, which is idle")
        if action.stage != stage or action.chunk not in range(plan.num_chunks):
            raise InvalidPlanError(f"{action} cannot stand on stage {stage} of {plan.num_stages}")
        if action.microbatch not in range(plan.num_microbatches):
            raise InvalidPlanError(f"{action} is not of the {plan.num_microbatches} micro-batches")
        to_successor = action.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        to_predecessor = action.kind in (Kind.RECV_FORWARD, Kind.SEND_BACKWARD)
        if (to_successor and plan.successor(stage, action.chunk) is None) or (
            to_predecessor and plan.predecessor(stage, action.chunk) is None
        ):
            raise InvalidPlanError(f"{action} has no stage at its other end")

    def _check_planned(self, action: Action, reason: str) -> None:
        if action not in self.planned:
            raise InvalidPlanError(f"{action} is missing: {reason}")

    def _needed_before(self, action: Action) -> Iterator[Action]:
        """What has to stand before an action on its stage."""
        match action.kind:
            case Kind.F:
                if self.plan.predecessor(action.stage, action.chunk):
                    yield _beside(action, Kind.RECV_FORWARD)
            case Kind.X | Kind.SEND_FORWARD:
                yield _beside(action, Kind.F)
            case Kind.B:
                yield _beside(action, Kind.F)
                if (action.stage, action.chunk) in self.exits:
                    yield _beside(action, Kind.X)
                # A fill may turn round before the last stage: then no gradient comes.
                successor = self.plan.successor(action.stage, action.chunk)
                if successor and Action(Kind.B, *successor, action.microbatch) in self.planned:
                    yield _beside(action, Kind.RECV_BACKWARD)
            case Kind.SEND_BACKWARD | Kind.W:
                yield _beside(action, Kind.B)

    def _needed_somewhere(self, action: Action) -> Iterator[Action]:
        """What a plan that holds an action has to hold too, anywhere on that stage."""
        match action.kind:
            case Kind.RECV_FORWARD:
                yield _beside(action, Kind.F)
            case Kind.RECV_BACKWARD:
                yield _beside(action, Kind.B)
            case Kind.B if self.has_weights:
                yield _beside(action, Kind.W)
            case Kind.F if self.has_backward and _beside(action, Kind.SEND_FORWARD) not in self.planned:
                yield _beside(action, Kind.B)
            case Kind.F if not self.has_backward and (action.stage, action.chunk) in self.exits:
                yield _beside(action, Kind.X)


def _check_link(sent: list[Action], received: list[Action]) -> None:
    unsent = set(received) - set(sent)
    if unsent:
        first = next(receive for receive in received if receive in unsent)
        raise InvalidPlanError(f"{first} waits for a message that nobody sends")
    for arriving, receive in zip(sent, received, strict=True):
        if arriving != receive:
            raise InvalidPlanError(f"{receive} would take the message of {arriving}: links keep their order")


def _beside(action: Action, kind: Kind) -> Action:
    return Action(kind, action.stage, action.chunk, action.microbatch)
