"""What a client has asked for, on its way: one or several texts that grow. No torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from megatron_ee.inference.completion import Piece
from megatron_ee.inference.growing_text import GrowingText
from megatron_ee.inference.request import Emission, Request, Scores
from megatron_ee.server.guard.budgets import Reservation
from megatron_ee.server.guard.keys import Client
from megatron_ee.server.protocol.errors import ApiError


@dataclass(slots=True, eq=False)
class Ticket:
    """One text.

    Attributes:
        index: among those of its asking.
        text: as it has grown.
        number: of the order by which the engine has, or had, it; None: it never did.
        cost: layer-tokens that it may take.
        is_judged: full depth looks at it, too, once it has ended.
        emissions: so far.
    """

    asking: "Asking"
    index: int
    request: Request
    text: GrowingText
    cost: float
    number: int | None = None
    is_judged: bool = False
    has_ended: bool = False
    emissions: list[Emission] = field(default_factory=list)

    @property
    def has_run(self) -> bool:
        """Whether the engine has had it."""
        return self.number is not None


@dataclass(slots=True, eq=False)
class Asking:
    """One request of a client, whose texts are told as they come.

    Attributes:
        identity: in answers and in logs.
        reservation: of layer-tokens for all its texts.
        began: by the clock of `time.monotonic`.
    """

    identity: str
    client: Client
    requests: Sequence[Request]
    reservation: Reservation | None = None
    began: float = field(default_factory=time.monotonic)
    tickets: list[Ticket] = field(default_factory=list)
    told: asyncio.Queue[tuple[int, Piece | Scores | ApiError]] = field(default_factory=asyncio.Queue)

    @property
    def has_ended(self) -> bool:
        return all(ticket.has_ended for ticket in self.tickets)

    async def answers(self) -> AsyncIterator[tuple[int, Piece | Scores]]:
        """What comes, by the index of its text, until all texts have ended.

        Raises:
            ApiError: one of them has failed.
        """
        going = len(self.tickets)
        while going:
            index, said = await self.told.get()
            if isinstance(said, ApiError):
                raise said
            yield index, said
            going -= isinstance(said, Piece) and said.finish_reason is not None
