"""Who looks on: metrics, budgets and the log of what was refused are told of all that comes and goes. No torch."""

import time
from dataclasses import dataclass, field
from typing import Any

from megatron_ee.errors import FieldError
from megatron_ee.inference.completion import drafts_of
from megatron_ee.inference.request import Emission
from megatron_ee.server.guard.audit import AuditLog
from megatron_ee.server.guard.budgets import Accounts, OverBudgetError, drafts_charged, layer_tokens
from megatron_ee.server.guard.keys import ANYBODY, Client, KeyRing
from megatron_ee.server.lookout import Lookout
from megatron_ee.server.metrics import Metrics
from megatron_ee.server.offered import Offered
from megatron_ee.server.protocol.errors import ApiError, invalid
from megatron_ee.server.tickets import Asking, Ticket

_BEARER = "bearer "
_NOTED = ("invalid_api_key", "out_of_bounds", "budget_exceeded", "too_large_for_budget")
"""Codes of refusals that the log notes."""


@dataclass(slots=True)
class Watcher:
    """
    Attributes:
        keys: None: whoever connects is served.
    """

    audit: AuditLog
    keys: KeyRing | None = None
    metrics: Metrics = field(default_factory=Metrics)
    accounts: Accounts = field(default_factory=Accounts)
    _lookout: Lookout | None = None
    _num_layers: int = 0
    _latest: dict[Ticket, float] = field(default_factory=dict)

    def open(self, offered: Offered) -> None:
        """The model is there."""
        self._num_layers = offered.num_layers
        self._lookout = Lookout(offered, self.metrics, self.audit)

    def client_of(self, authorization: str | None) -> Client:
        """Who asks, by the header of that name.

        Raises:
            ApiError: 401.
        """
        if self.keys is None:
            return ANYBODY
        said = authorization or ""
        key = said[len(_BEARER) :].strip() if said[: len(_BEARER)].lower() == _BEARER else None
        client = self.keys.client_of(key)
        if client is None:
            reason = "no API key: send Authorization: Bearer KEY" if key is None else "nobody has this API key"
            raise ApiError(401, reason, code="invalid_api_key")
        return client

    def admit(self, asking: Asking, most: float) -> None:
        """Set aside what it may take at most.

        Raises:
            ApiError: 429: its client has used up what it may; 400: it is more than it may ever use.
        """
        try:
            asking.reservation = self.accounts.reserve(asking.client, most, time.monotonic())
        except OverBudgetError as error:
            raise ApiError(429, str(error), code="budget_exceeded", retry_after=error.retry_after) from None
        except FieldError as error:
            raise invalid("max_tokens", error.message, code="too_large_for_budget") from None
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in asking.requests))

    def token(self, ticket: Ticket, emission: Emission) -> None:
        """The newest of a text."""
        now, metrics = time.monotonic(), self.metrics
        before = self._latest.get(ticket)
        if before is None:
            metrics.time_to_first_token.observe(now - ticket.asking.began)
        else:
            metrics.inter_token_latency.observe(now - before)
        self._latest[ticket] = now
        metrics.generation_tokens.inc()
        metrics.exit_tokens.labels(exit_layer=emission.exit_layer).inc()

    def ended(self, asking: Asking, outcome: str) -> None:
        """With whatever outcome."""
        now, metrics = time.monotonic(), self.metrics
        for ticket in asking.tickets:
            self._latest.pop(ticket, None)
        metrics.latency.observe(now - asking.began)
        metrics.requests.labels(outcome=outcome).inc()
        drafts = drafts_of(emission for ticket in asking.tickets for emission in ticket.emissions)
        metrics.draft_tokens.inc(drafts.drafted)
        metrics.accepted_tokens.inc(drafts.accepted)
        used = sum(self.used(ticket) for ticket in asking.tickets)
        metrics.layer_tokens.labels(client=asking.client.name).inc(used)
        if asking.reservation is not None:
            self.accounts.settle(asking.reservation, used, now)
        assert self._lookout is not None
        self._lookout.saw(asking, now)

    def used(self, ticket: Ticket) -> float:
        """Layer-tokens of one text; none of one that has never run."""
        if not ticket.has_run:
            return 0.0
        exit = ticket.request.exit
        discarded = sum(emission.discarded for emission in ticket.emissions) if drafts_charged(exit) else 0
        layers = [emission.exit_layer for emission in ticket.emissions]
        return layer_tokens(len(ticket.request.prompt), layers, num_layers=self._num_layers, discarded=discarded)

    def judged(self, agreeing: int, tokens: int) -> None:
        """What full depth thinks of tokens that left early."""
        assert self._lookout is not None
        self._lookout.judged(agreeing, tokens, time.monotonic())

    def refused(self, state: Any, error: ApiError) -> None:
        """An answer that is an error. One to a request that was taken in is no refusal: it has ended, see `ended`.

        Args:
            state: of the request: who asked, as far as that is known. None: nobody has looked into it.
        """
        if getattr(state, "is_taken_in", False):
            return
        code = error.code or str(error.status)
        self.metrics.refused.labels(code=code).inc()
        if code in _NOTED:
            client: Client | None = getattr(state, "client", None)
            name = "" if client is None else client.name
            self.audit.note(code, client=name, request=getattr(state, "identity", ""), field=error.param)

    def look(self, *, num_running: int, num_waiting: int) -> None:
        """What metrics say of this moment."""
        self.metrics.num_running.set(num_running)
        self.metrics.num_waiting.set(num_waiting)
