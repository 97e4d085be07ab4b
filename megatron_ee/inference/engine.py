"""Serves requests that come at any time: takes in, launches, gives back."""

from collections import deque
from dataclasses import dataclass

from megatron_ee.inference.batch import Batch
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.sampling import NoTokenError
from megatron_ee.inference.scheduling.planner import Planner


@dataclass(slots=True)
class _Waiting:
    number: int
    request: Request


class Engine:
    """Requests wait until a place is free, first come, first served. No token depends on who else is there, on the
    order of arrival or on the strategy.

    Attributes:
        batch: its places; its ledger, cache and count of work are open to look at.

    Args:
        batch: empty.
        planner: says what runs next.
    """

    def __init__(self, batch: Batch, planner: Planner) -> None:
        self.batch, self._planner = batch, planner
        self._waiting: deque[_Waiting] = deque()
        self._number_of: dict[int, int] = {}
        self._slot_of: dict[int, int] = {}
        self._next = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._slot_of

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Take in a request. Returns its number.

        Raises:
            FieldError: see `Batch.check`.
        """
        self.batch.check(request)
        number, self._next = self._next, self._next + 1
        self._waiting.append(_Waiting(number, request))
        return number

    def abort(self, number: int) -> None:
        """Forget a request, wherever it is; nothing more is said of it. One that has ended or is unknown is none."""
        self._waiting = deque(of for of in self._waiting if of.number != number)
        if number in self._slot_of:
            self._release(number)

    def step(self) -> list[tuple[int, Emission]]:
        """Run one launch. Returns what is said with it: of a request, by its number, a token or several. After one with
        `finish` there are no more.

        Raises:
            NoTokenError: there is none to choose in some requests, which it names.
        """
        self._admit()
        fronts = self.batch.fronts()
        if not fronts:
            return []
        plan = self.batch.plan(self._planner, fronts)
        try:
            said = self.batch.launch(plan)
        except NoTokenError as error:
            raise NoTokenError([self._number_of[slot] for slot in error.rows]) from error
        emitted = [(self._number_of[slot], emission) for slot, emission in said]
        for number, emission in emitted:
            if emission.finish is not None:
                self._release(number)
        return emitted

    def _admit(self) -> None:
        while self._waiting and self.batch.free_slots:
            of = self._waiting.popleft()
            slot = self.batch.add(of.request)
            self._number_of[slot], self._slot_of[of.number] = of.number, slot

    def _release(self, number: int) -> None:
        slot = self._slot_of.pop(number)
        del self._number_of[slot]
        self.batch.remove(slot)
