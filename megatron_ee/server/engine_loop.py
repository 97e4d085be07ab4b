"""The engine's thread: takes orders, steps, tells what is said. Every process of a model runs it alike."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from megatron_ee.errors import UserError
from megatron_ee.inference.request import Emission, Failure
from megatron_ee.server.bridge import Said
from megatron_ee.server.orders import Abort, Add, Orders

if TYPE_CHECKING:
    from megatron_ee.inference.engine import Engine


class Commander(Protocol):
    def next(self, *, is_idle: bool) -> Orders:
        """What comes before the next step; the same in every process. May wait if there is nothing else to do."""
        ...


def run_engine(engine: "Engine", commander: Commander, tell: Callable[[Said], None]) -> None:
    """Until it is told to stop, or a stage is lost: then all that is under way has failed.

    Args:
        tell: what the engine says, by the numbers of orders.
    """
    numbers = _Numbers()
    while not engine.is_lost:
        orders = commander.next(is_idle=engine.is_idle)
        said: list[tuple[int, Failure]] = []
        for order in orders.orders:
            if isinstance(order, Abort):
                engine.abort(numbers.drop(order.number))
            elif (failure := _add(engine, order, numbers)) is not None:
                said.append((order.number, failure))
        if orders.stops:
            break
        if said:
            tell(said)
        if not engine.is_idle and (spoken := engine.step()):
            tell(numbers.outside(spoken))
    engine.close()


def _add(engine: "Engine", order: Add, numbers: "_Numbers") -> Failure | None:
    try:
        numbers.keep(order.number, engine.add(order.request, priority=order.priority))
    except UserError as error:
        return Failure(str(error))
    return None


class _Numbers:
    """Of requests: outside, and in the engine."""

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._outside: dict[int, int] = {}

    def keep(self, outside: int, inside: int) -> None:
        self._inside[outside], self._outside[inside] = inside, outside

    def outside(self, spoken: Said) -> Said:
        """The same, by the numbers outside. Those of requests that end with it are forgotten."""
        told = [(self._outside[number], of) for number, of in spoken]
        for number, of in told:
            if isinstance(of, Failure) or (isinstance(of, Emission) and of.finish is not None):
                self.drop(number)
        return told

    def drop(self, outside: int) -> int:
        """Returns its number inside; -1, which is nobody's, where there is none."""
        inside = self._inside.pop(outside, -1)
        self._outside.pop(inside, None)
        return inside
