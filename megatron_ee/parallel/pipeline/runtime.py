"""Runs one stage's share of a plan: exactly its actions, in exactly its order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.p2p import Inbox, MessageSpec, Outbox
from megatron_ee.parallel.pipeline.deliveries import RECEIVES, SENDS, deliveries
from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan


class StageProgram(Protocol):
    """What F, X, B and W compute. The runtime moves hidden states and gradients between stages and knows no model."""

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        """F: the stage's output x_SBH, from the previous stage's output (None where the tokens enter)."""
        ...

    def exits(self, action: Action) -> None:
        """X: the losses of the stage's exits."""
        ...

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """B: the gradient of what F received, from the gradient of what it returned (None at the final exit)."""
        ...

    def weights(self, action: Action) -> None:
        """W: the gradients of the layers' matrices, in plans where B leaves them for later."""
        ...


class ActionWatch(Protocol):
    """Looks on while a stage runs its actions, one at a time: F, X, B and W, and its sends and receives, where a
    receive is the wait for its message."""

    def begin(self, action: Action) -> None:
        """The action is about to run."""
        ...

    def end(self, action: Action) -> None:
        """It has run; on CUDA, its work has been handed over."""
        ...


class Runtime:
    """Executes plans on this rank's stage."""

    def __init__(self, mesh: Mesh, message: MessageSpec) -> None:
        self._mesh, self._message = mesh, message
        self._deliveries: list[tuple[Plan, Mapping[Action, tuple[Action, ...]]]] = []  # of the plans run so far

    def run(self, plan: Plan, program: StageProgram, *, watches: Sequence[ActionWatch] = ()) -> None:
        """Run this stage's actions and return when all of its messages have left."""
        assert plan.num_stages == self._mesh.pipeline_size, "the plan is for another pipeline"
        _Execution(self._mesh, self._message, plan, program, watches, self._deliveries_of(plan)).run()

    def _deliveries_of(self, plan: Plan) -> Mapping[Action, tuple[Action, ...]]:
        for known, safe in self._deliveries:
            if known is plan:
                return safe
        self._deliveries.append((plan, deliveries(plan, self._mesh.pipeline_rank)))
        return self._deliveries[-1][1]


class _Execution:
    """The state of one run: messages under way, and what waits between two actions."""

    def __init__(
        self,
        mesh: Mesh,
        message: MessageSpec,
        plan: Plan,
        program: StageProgram,
        watches: Sequence[ActionWatch],
        safe: Mapping[Action, tuple[Action, ...]],
    ) -> None:
        self.mesh, self.plan, self.program, self.watches = mesh, plan, program, watches
        self.safe = safe  # sends to finish, by the action after which they have arrived
        self.actions = plan.actions[mesh.pipeline_rank]
        self.outbox = Outbox()
        sources = Counter(self._channel(action) for action in self.actions if action.kind in RECEIVES)
        self.inboxes = {
            (peer, group): Inbox(count, message, source=peer, group=group) for (peer, group), count in sources.items()
        }
        self.sent = {action for action in self.actions if action.kind in SENDS}
        self.held: dict[tuple[Kind, int, int], torch.Tensor | None] = {}

    def run(self) -> None:
        for action in self.actions:
            for watch in self.watches:
                watch.begin(action)
            self._execute(action)
            for watch in self.watches:
                watch.end(action)
            for send in self.safe.get(action, ()):
                self.outbox.finish(send)
        self.outbox.flush()

    def _execute(self, action: Action) -> None:
        def take(kind: Kind) -> torch.Tensor | None:
            return self.held.pop((kind, action.chunk, action.microbatch), None)

        def hold(tensor: torch.Tensor | None) -> None:
            if tensor is not None:
                self.held[action.kind, action.chunk, action.microbatch] = tensor

        def is_sent(kind: Kind) -> bool:
            return replace(action, kind=kind) in self.sent

        match action.kind:
            case Kind.F:
                output = self.program.forward(action, take(Kind.RECV_FORWARD))
                hold(output if is_sent(Kind.SEND_FORWARD) else None)
            case Kind.X:
                self.program.exits(action)
            case Kind.B:
                gradient = self.program.backward(action, take(Kind.RECV_BACKWARD))
                hold(gradient if is_sent(Kind.SEND_BACKWARD) else None)
            case Kind.W:
                self.program.weights(action)
            case Kind.SEND_FORWARD | Kind.SEND_BACKWARD:
                tensor = take(_PRODUCER[action.kind])
                assert tensor is not None, f"nothing to send at {action}"
                peer, group = self._channel(action)
                self.outbox.send(action, tensor, to=peer, group=group)
            case Kind.RECV_FORWARD | Kind.RECV_BACKWARD:
                hold(self.inboxes[self._channel(action)].receive())

    def _channel(self, action: Action) -> tuple[int, dist.ProcessGroup]:
        """The rank at the other end of a send or receive, and the group that carries it."""
        towards_end = action.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)
        neighbour = self.plan.successor if towards_end else self.plan.predecessor
        peer = neighbour(action.stage, action.chunk)
        assert peer is not None, f"no stage at the other end of {action}"
        stage, chunk = peer
        group = self.mesh.links.choose(
            carries_gradients=action.kind in (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD), wraps=chunk != action.chunk
        )
        return self.mesh.pipeline_ranks[stage], group


_PRODUCER = {Kind.SEND_FORWARD: Kind.F, Kind.SEND_BACKWARD: Kind.B}
