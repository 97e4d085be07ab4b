"""What a server does with what is asked: who waits, who is served, and what comes of it. All of it happens in the event
loop; the engine is on the other side of a bridge. No torch.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

from megatron_ee.inference.growing_text import GrowingText
from megatron_ee.inference.request import Emission, Failure, Request, Scores
from megatron_ee.server.bridge import Bridge, Said
from megatron_ee.server.guard.budgets import most_layer_tokens
from megatron_ee.server.guard.fair_queue import FairQueue
from megatron_ee.server.guard.keys import Client
from megatron_ee.server.judging import Judging
from megatron_ee.server.offered import Offered
from megatron_ee.server.orders import Abort, Add
from megatron_ee.server.protocol.errors import ApiError
from megatron_ee.server.tickets import Asking, Ticket
from megatron_ee.server.watchers import Watcher


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ENDED = "ended"


class Service:
    """
    Attributes:
        state: it serves while it is ready, and ends what is under way while it drains.
        num_running: texts that the engine has.

    Args:
        watcher: is told of all that comes and goes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, watcher: Watcher) -> None:
        self.state = State.LOADING
        self.bridge = Bridge(loop, self.hear)
        self.num_running = 0
        self._loop, self._watcher = loop, watcher
        self._offered: Offered | None = None
        self._slots = 0
        self._queue: FairQueue[Ticket] = FairQueue()
        self._running: dict[int, Ticket] = {}
        self._askings: dict[Asking, asyncio.TimerHandle] = {}
        self._next = 0
        self._judging: Judging | None = None
        self._drained: Callable[[], None] | None = None

    @property
    def offered(self) -> Offered:
        """
        Raises:
            ApiError: 503: it is not ready.
        """
        if self.state is not State.READY or self._offered is None:
            reasons = {State.LOADING: "the model is being loaded", State.ENDED: "the model is lost"}
            code = "loading" if self.state is State.LOADING else "shutting_down"
            reason = reasons.get(self.state, "the server is shutting down")
            raise ApiError(503, reason, code=code, retry_after=5)
        return self._offered

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def open(self, offered: Offered, *, slots: int) -> None:
        """Begin to serve; texts beyond so many wait."""
        self._offered, self._slots, self.state = offered, slots, State.READY
        self._judging = Judging(offered, self._watcher.judged)
        self._watcher.open(offered)

    def submit(self, identity: str, client: Client, requests: Sequence[Request]) -> Asking:
        """Take in what a client asks for.

        Raises:
            ApiError: 429: too many wait already; 503: it is not ready.
        """
        offered = self.offered
        settings = offered.config.serving
        waiting = self.num_waiting + max(0, self.num_running + len(requests) - self._slots)
        if self.num_waiting and waiting > settings.max_waiting:
            raise ApiError(429, f"{self.num_waiting} requests wait already", code="queue_full", retry_after=1)
        costs = [_most_layer_tokens(request, offered.num_layers) for request in requests]
        asking = Asking(identity, client, requests)
        self._watcher.admit(asking, sum(costs))
        asking.tickets = [self._ticket(asking, index, cost) for index, cost in enumerate(costs)]
        self._askings[asking] = self._loop.call_later(settings.timeout, self._expire, asking)
        for ticket in asking.tickets:
            self._queue.put(ticket, client, ticket.cost)
        self._serve_next()
        return asking

    def leave(self, asking: Asking) -> None:
        """Nobody listens to it any more. One that has ended may be left, too."""
        self._fail(asking, ApiError(499, "the client has gone", code="cancelled"))

    def hear(self, said: Said) -> None:
        """What the engine says."""
        for number, of in said:
            if (ticket := self._running.get(number)) is None:
                if self._judging is not None:
                    self._judging.hear(number, of)  # otherwise it has left in the meantime
                continue
            asking = ticket.asking
            if isinstance(of, Failure):
                self._fail(asking, ApiError(400, of.reason))
            elif isinstance(of, Scores):
                asking.told.put_nowait((ticket.index, of))
            else:
                self._take(ticket, of)
        self._serve_next()

    def drain(self, seconds: float, then: Callable[[], None]) -> None:
        """Take in nothing more; texts under way have some time to end. A second call leaves them none.

        Args:
            then: is called when all have ended.
        """
        if self.state is State.ENDED:
            return
        self.state, self._drained = State.DRAINING, then
        self._loop.call_later(seconds, self._end_all, "the server is shutting down")
        self._report_if_drained()

    def end(self, reason: str) -> None:
        """The engine is no more: whoever waits is told why."""
        self.state = State.ENDED
        self._end_all(reason)

    def _take(self, ticket: Ticket, emission: Emission) -> None:
        piece = ticket.text.take(emission)
        ticket.emissions.append(emission)
        self._watcher.token(ticket, emission)
        ticket.asking.told.put_nowait((ticket.index, piece))
        if piece.finish_reason is not None:
            if emission.finish is None:  # a stop string has ended it, of which the engine knows nothing
                self._abort(ticket)
            if ticket.is_judged and self._judging is not None:
                self._judging.offer(ticket.request, ticket.emissions, busy=bool(self._queue))
            self._end(ticket, piece.finish_reason)

    def _ticket(self, asking: Asking, index: int, cost: float) -> Ticket:
        assert self._judging is not None
        request, is_judged = self._judging.draw(asking.requests[index])
        text = GrowingText(index, request, self.offered.tokenizer)
        return Ticket(asking, index, request, text, cost, is_judged=is_judged)

    def _serve_next(self) -> None:
        while self.num_running < self._slots and (ticket := self._queue.pop()) is not None:
            ticket.number = self._new_number()
            self._running[ticket.number] = ticket
            self.num_running += 1
            self.bridge.give(Add(ticket.number, ticket.request))
        if self.num_running < self._slots and self.state is State.READY:
            self._judge_next()

    def _judge_next(self) -> None:
        """An answer that full depth is to look at, too, if there is one: nobody waits for this place."""
        assert self._judging is not None
        if (request := self._judging.next(self._next + 1)) is not None:
            self.bridge.give(Add(self._new_number(), request, priority=1))

    def _new_number(self) -> int:
        self._next += 1
        return self._next

    def _abort(self, ticket: Ticket) -> None:
        assert ticket.number is not None
        self.bridge.give(Abort(ticket.number))

    def _end(self, ticket: Ticket, outcome: str) -> None:
        ticket.has_ended = True
        if ticket.number is not None:
            del self._running[ticket.number]
            self.num_running -= 1
            self._queue.release(ticket.asking.client, ticket.cost - self._watcher.used(ticket))
        asking = ticket.asking
        if asking.has_ended:
            self._askings.pop(asking).cancel()
            self._watcher.ended(asking, outcome)
            self._report_if_drained()

    def _fail(self, asking: Asking, error: ApiError) -> None:
        """All its texts that have not ended."""
        going = [ticket for ticket in asking.tickets if not ticket.has_ended]
        for ticket in going:
            if ticket.number is None:
                self._queue.remove(ticket)
            else:
                self._abort(ticket)
            asking.told.put_nowait((ticket.index, error))
            self._end(ticket, error.code or "failed")
        if going:
            self._serve_next()

    def _expire(self, asking: Asking) -> None:
        seconds = time.monotonic() - asking.began
        self._fail(asking, ApiError(503, f"it has not ended after {seconds:.0f} s", code="timeout"))

    def _end_all(self, reason: str) -> None:
        for asking in list(self._askings):
            self._fail(asking, ApiError(503, reason, code="shutting_down"))
        self._report_if_drained()

    def _report_if_drained(self) -> None:
        if self.state is State.DRAINING and not self._askings and self._drained is not None:
            then, self._drained = self._drained, None
            then()


def _most_layer_tokens(request: Request, num_layers: int) -> float:
    new_tokens = request.sampling.max_new_tokens
    return most_layer_tokens(len(request.prompt), new_tokens, request.exit, num_layers=num_layers)
