"""What clients may use: a bucket of layer-tokens for each (one is a layer run for a token), which fills steadily.

A request sets aside what it may take at most, and pays what it took when it has ended. What is set aside stays in the
bucket, but is nobody else's: so a client never takes more, in any span of time, than a full bucket and what came in.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.server.guard.keys import Client

_SOONEST = 1.0


class TooLargeForBudgetError(FieldError):
    """A request that no waiting helps: at most it takes more than its client's whole budget."""


class OverBudgetError(UserError):
    """A request that has to wait.

    Attributes:
        retry_after: seconds until it may be tried again; where requests under way hold the budget, a guess.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """What one request has set aside of its client's budget."""

    client: Client
    most: float


class Accounts:
    """The budgets of all clients. Whoever has none sets aside and pays as others do, and is never refused."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def reserve(self, client: Client, most: float, now: float) -> Reservation:
        """
        Raises:
            OverBudgetError: not yet.
            TooLargeForBudgetError: never.
        """
        reservation = Reservation(client, most)
        if client.layer_tokens is None:
            return reservation
        if most > client.layer_tokens:
            message = (
                f"prompt and answer may take {most:.0f} layer-tokens, more than the whole budget of "
                f"{client.layer_tokens:.0f} in {client.window:g} s: ask for fewer new tokens"
            )
            raise TooLargeForBudgetError("inference.sampling.max_new_tokens", message)
        bucket = self._bucket(client)
        bucket.fill(now)
        if (lacking := most - bucket.free) > 0:
            message = (
                f"the budget of {client.layer_tokens:.0f} layer-tokens in {client.window:g} s is used up for now: "
                f"{max(bucket.free, 0.0):.0f} are free, and this request may take {most:.0f}"
            )
            raise OverBudgetError(message, max(lacking / bucket.rate, _SOONEST))
        bucket.held[reservation] = most
        return reservation

    def settle(self, reservation: Reservation, used: float, now: float) -> None:
        """Pay what was used; the rest is free again. Once only: a second time changes nothing."""
        if reservation.client.layer_tokens is None:
            return
        bucket = self._bucket(reservation.client)
        bucket.fill(now)
        if bucket.held.pop(reservation, None) is not None:
            bucket.level -= used

    def free(self, client: Client, now: float) -> float | None:
        """Layer-tokens that it may set aside now; None: no limit."""
        if client.layer_tokens is None:
            return None
        bucket = self._bucket(client)
        bucket.fill(now)
        return bucket.free

    def _bucket(self, client: Client) -> "_Bucket":
        assert client.layer_tokens is not None
        if client.name not in self._buckets:
            self._buckets[client.name] = _Bucket(client.layer_tokens, client.layer_tokens / client.window)
        return self._buckets[client.name]


def layer_tokens(num_prompt: int, exit_layers: Iterable[int], *, num_layers: int, discarded: int = 0) -> float:
    """What a request took: its prompt and drafts that were in vain at full depth, its answer as deep as it went.

    Args:
        discarded: drafted tokens that full depth did not accept, where the draft's length was given (see
            `drafts_charged`).
    """
    return float((num_prompt + discarded) * num_layers + sum(exit_layers))


def most_layer_tokens(num_prompt: int, new_tokens: int, exit: ExitParams, *, num_layers: int) -> float:
    """The most that `layer_tokens` can come to."""
    drafted = exit.draft_length if drafts_charged(exit) and exit.draft_length != "auto" else 0
    return float((num_prompt + new_tokens * (1 + drafted)) * num_layers)


def drafts_charged(exit: ExitParams) -> bool:
    """Whether drafts in vain are paid for: those whose length was given. With `auto` the server drafts as it pays."""
    return exit.mode == "speculative" and exit.draft_length != "auto"


class _Bucket:
    """
    Attributes:
        level: what has come in and was not paid; at most the capacity.
        held: of it, what is set aside.
    """

    def __init__(self, capacity: float, rate: float) -> None:
        self._capacity, self.rate, self.level = capacity, rate, capacity
        self.held: dict[Reservation, float] = {}
        self._filled: float | None = None

    @property
    def free(self) -> float:
        return self.level - sum(self.held.values())

    def fill(self, now: float) -> None:
        if self._filled is not None and now > self._filled:
            self.level = min(self.level + (now - self._filled) * self.rate, self._capacity)
        self._filled = now if self._filled is None else max(now, self._filled)
