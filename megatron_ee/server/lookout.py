"""Who watches for alarms, and says so: in the log, in metrics, and in the file of what was refused. No torch."""

import logging

from megatron_ee.inference.completion import drafts_of
from megatron_ee.server.guard.alarms import Alarm, Alarms, Kind, compare
from megatron_ee.server.guard.audit import AuditLog
from megatron_ee.server.metrics import Metrics
from megatron_ee.server.offered import Offered
from megatron_ee.server.tickets import Asking, Ticket

_log = logging.getLogger("megatron_ee")


class Lookout:
    def __init__(self, offered: Offered, metrics: Metrics, audit: AuditLog) -> None:
        self._offered, self._metrics, self._audit = offered, metrics, audit
        self._alarms = Alarms(offered.config.serving.alarms)
        self._raised: dict[tuple[Kind, str], Alarm] = {}
        self._agreeing = self._shadowed = 0

    def saw(self, asking: Asking, now: float) -> None:
        """It has ended, with whatever outcome."""
        for ticket in asking.tickets:
            self._compare(ticket, now)
        self._report(now)

    def judged(self, agreeing: int, tokens: int, now: float) -> None:
        """What full depth thinks of tokens that left early."""
        self._alarms.judged(agreeing, tokens, now)
        self._agreeing, self._shadowed = self._agreeing + agreeing, self._shadowed + tokens
        self._metrics.shadowed.inc(tokens)
        self._metrics.agreement.set(self._agreeing / self._shadowed)
        self._report(now)

    def _compare(self, ticket: Ticket, now: float) -> None:
        """One text with those of others."""
        offered, emissions, request = self._offered, ticket.emissions, ticket.request
        drafts = drafts_of(emissions)
        is_scored = request.prompt_logprobs is not None  # its first token is one of full depth
        self._alarms.saw(
            ticket.asking.client.name,
            early=sum(emission.exit_layer < offered.num_layers for emission in emissions),
            tokens=len(emissions),
            drafted=drafts.drafted,
            accepted=drafts.accepted,
            now=now,
            compared=None if is_scored else compare(request.exit, offered.exit, offered.exits),
        )

    def _report(self, now: float) -> None:
        """Alarms that have begun or ended since."""
        active = {(alarm.kind, alarm.client or ""): alarm for alarm in self._alarms.active(now)}
        for about in active.keys() - self._raised.keys():
            self._begin(*about, active[about])
        for kind, client in self._raised.keys() - active.keys():
            _log.warning("the alarm about %s has ended", _named(kind, client))
            self._metrics.alarms.labels(kind=kind, client=client).set(0)
        self._raised = active

    def _begin(self, kind: Kind, client: str, alarm: Alarm) -> None:
        value, reference = round(alarm.value, 4), round(alarm.reference, 4)
        _log.warning("alarm: %s is %.3f, beside %.3f", _named(kind, client), value, reference)
        self._audit.note("alarm", client=client, request="", kind=kind, value=value, reference=reference)
        self._metrics.alarms.labels(kind=kind, client=client).set(1)


def _named(kind: Kind, client: str) -> str:
    return f"{kind} of {client}" if client else kind
