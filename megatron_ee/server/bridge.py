"""Between the event loop, where clients are heard, and the thread that has the engine: two queues. No torch."""

import asyncio
import queue
from collections.abc import Callable, Sequence

from megatron_ee.inference.request import Emission, Failure, Scores
from megatron_ee.server.orders import Abort, Add, Orders

Said = Sequence[tuple[int, Emission | Failure | Scores]]
"""By the numbers of orders."""


class Bridge:
    """
    Args:
        loop: of the clients.
        hear: is called there with what the engine says.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, hear: Callable[[Said], None]) -> None:
        self._loop, self._hear = loop, hear
        self._orders: queue.SimpleQueue[Add | Abort | None] = queue.SimpleQueue()

    def give(self, order: Add | Abort) -> None:
        """To the engine; from any thread."""
        self._orders.put(order)

    def stop(self) -> None:
        """The engine, after all that has been ordered; from any thread."""
        self._orders.put(None)

    def take(self, wait: float) -> Orders:
        """All that has been ordered since, in the engine's thread.

        Args:
            wait: seconds for a first order to come, if there is none.
        """
        orders: list[Add | Abort] = []
        try:
            order = self._orders.get(timeout=wait) if wait else self._orders.get_nowait()
            while order is not None:
                orders.append(order)
                order = self._orders.get_nowait()
        except queue.Empty:
            return Orders(tuple(orders))
        return Orders(tuple(orders), stops=True)

    def tell(self, said: Said) -> None:
        """The clients, from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._hear, said)
        except RuntimeError:  # the loop is closed: nobody listens any more
            assert self._loop.is_closed()
