"""Whose request is next: each client gets, while it waits, at least its weight's share of what is served.

Start-time fair queueing (Goyal, Vin & Chen, SIGCOMM 1996) with one tag for each client. A client's tag grows by cost
/ weight with each of its requests that is taken, and who has the least is next. One that comes anew begins where those
being served are, so that nobody saves up turns. Of two clients that both wait, one is ahead of the other by no more
than a request of each, over its weight.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatron_ee.server.guard.keys import Client

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True)
class _Line(Generic[T]):
    """One client's requests, first come first served.

    Attributes:
        waiting: request -> cost.
        tag: when it is its turn, in virtual time.
        since: the number of its first waiting request, which decides between equal tags.
    """

    client: Client
    waiting: dict[T, float] = field(default_factory=dict)
    tag: float = 0.0
    since: int = 0
    running: int = 0

    @property
    def is_free(self) -> bool:
        """Whether one more of its requests may run."""
        return self.client.max_running is None or self.running < self.client.max_running


class FairQueue(Generic[T]):
    """Requests that wait. They are hashable, and no two of them equal."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._owners: dict[T, str] = {}
        self._virtual = 0.0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._owners)

    def waiting(self, client: Client) -> int:
        """How many of its requests wait."""
        return len(self._lines[client.name].waiting) if client.name in self._lines else 0

    def running(self, client: Client) -> int:
        """How many of its requests were taken and not given back."""
        return self._lines[client.name].running if client.name in self._lines else 0

    def put(self, item: T, client: Client, cost: float) -> None:
        """
        Args:
            cost: of any unit, the same for all; positive.
        """
        assert item not in self._owners and cost > 0
        line = self._lines.setdefault(client.name, _Line(client))
        self._arrivals += 1
        if not line.waiting:
            line.tag, line.since = max(line.tag, self._virtual), self._arrivals
        line.waiting[item] = cost
        self._owners[item] = client.name

    def pop(self) -> T | None:
        """Who is next, and runs now; None: nobody waits, or only clients that have as many running as they may."""
        ready = [line for line in self._lines.values() if line.waiting and line.is_free]
        if not ready:
            return None
        line = min(ready, key=lambda line: (line.tag, line.since))
        item, cost = next(iter(line.waiting.items()))
        self._virtual = line.tag  # never back: a line that waits is never behind it
        line.tag += cost / line.client.weight
        line.running += 1
        self._arrivals += 1
        line.since = self._arrivals
        self._drop(line, item)
        return item

    def release(self, client: Client, unused: float = 0.0) -> None:
        """One of its requests has ended.

        Args:
            unused: of its cost, what it did not take after all.
        """
        line = self._lines[client.name]
        assert line.running > 0
        # Neither what it gets back nor what it waited for itself, at its limit, is a turn saved up.
        line.tag = max(line.tag - unused / line.client.weight, self._virtual)
        line.running -= 1
        self._forget(line)

    def remove(self, item: T) -> bool:
        """Whether it waited still; it does no more, and costs nothing."""
        if item not in self._owners:
            return False
        line = self._lines[self._owners[item]]
        self._drop(line, item)
        self._forget(line)
        return True

    def _drop(self, line: _Line[T], item: T) -> None:
        del line.waiting[item], self._owners[item]

    def _forget(self, line: _Line[T]) -> None:
        """Once nobody is left, what was used in idle times counts for nobody."""
        if not line.waiting and not line.running and line.tag <= self._virtual:
            del self._lines[line.client.name]
        if not any(line.waiting or line.running for line in self._lines.values()):
            self._lines.clear()
