"""When somebody should look: a client whose tokens hardly leave early, or whose drafts are hardly accepted, beside all
others; everybody's, beside their own past; and answers that full depth would not give.

Slowdown inputs are crafted so that nothing exits: they cost what full depth costs, and make early exit's promise void.
Whoever asks for full depth is no such client: what counts are requests whose settings let tokens out as easily as the
server's own do, or more easily (see `compare`).

A client's limit is `alarms.exit_rate` times the others' median share, or less where clients differ by nature: three
deviations of them below the median. See `evidence` for how sure an alarm is.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal, NamedTuple

from megatron_ee.config import AlarmsConfig, ExitParams
from megatron_ee.server.guard.evidence import Evidence, Shares

Kind = Literal["exit_rate", "acceptance", "agreement"]

_TOKENS = 64  # of an observation; of drafted and of judged ones
_DRAFTED = 32
_JUDGED = 16

_DEVIATIONS = 3.0
_DEVIATION = 0.1  # between clients, before any others are known
_OF_REQUESTS = 0.3  # within a client
_LEAST = 0.01
_WORTH = 4  # what is assumed of clients, in clients

_FORGOTTEN = 3600.0  # seconds after which an alarm about a client that is gone ends


@dataclass(frozen=True, slots=True)
class Alarm:
    """
    Attributes:
        client: None: it is about everybody.
        since: when it began, by the caller's clock.
        value: the share of the latest requests.
        reference: what it is held against: others' share, their own past, or the limit of agreement.
    """

    kind: Kind
    client: str | None
    since: float
    value: float
    reference: float


def compare(exit: ExitParams, own: ExitParams, exits: Collection[int]) -> Literal["own", "easier"] | None:
    """Whether a request's tokens leave by the server's own settings, or more easily; None: neither, so that nothing
    can be said of one whose tokens stay.

    Args:
        exits: the model's.
    """
    needed = own.model_copy(update={"mode": "early_exit"}).may_fire(exits)
    asked = exit.may_fire(exits)
    if not asked or exit.measure != own.measure or exit.patience > own.patience:
        return None
    if any(asked.get(layer, 1.0) > threshold for layer, threshold in needed.items()):
        return None
    return "own" if asked == needed and exit.patience == own.patience else "easier"


class Alarms:
    """Takes each request once it has ended."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._exit_rate = _Watch("exit_rate", config.exit_rate, config.window, _TOKENS)
        self._acceptance = _Watch("acceptance", config.acceptance, config.window, _DRAFTED)
        self._agreement = _Agreement(config.agreement, config.window)

    def saw(
        self,
        client: str,
        *,
        early: int,
        tokens: int,
        drafted: int,
        accepted: int,
        now: float,
        compared: Literal["own", "easier"] | None = "own",
    ) -> None:
        """
        Args:
            early, tokens: of its answer, those that left early, and all.
            compared: see `compare`; with None, its depths say nothing.
        """
        if compared is not None and tokens:
            self._exit_rate.saw(client, early, tokens, now, is_reference=compared == "own")
        if drafted:
            self._acceptance.saw(client, accepted, drafted, now, is_reference=True)

    def judged(self, agreeing: int, tokens: int, now: float) -> None:
        """An answer that full depth has judged, see `shadow`."""
        self._agreement.judged(agreeing, tokens, now)

    def active(self, now: float) -> list[Alarm]:
        """Those that have begun and not ended."""
        return [*self._exit_rate.active(now), *self._acceptance.active(now), *self._agreement.active()]


@dataclass(slots=True)
class _State:
    """Of one client, or of everybody."""

    evidence: Evidence = field(default_factory=Evidence)
    alarm: Alarm | None = None
    since_alarm: int = 0
    seen: float = 0.0

    def raise_alarm(self, alarm: Alarm) -> None:
        self.alarm, self.since_alarm = alarm, 0
        self.evidence.forget()

    def end_alarm(self) -> None:
        self.alarm = None
        self.evidence.forget()


class _Measure(NamedTuple):
    """What a client's requests are held against. Those above `most` count as much, and shares are parts of it: an easy
    request says little of the others, and small shares differ as well as large ones.

    Attributes:
        usual: the mean of such a part.
        limit: at which the client is not as others are.
    """

    reference: float
    most: float
    usual: float
    limit: float

    def of(self, share: float) -> float:
        return min(share / self.most, 1.0)


class _Watch:
    """A share of each client, beside the others' and its own past."""

    def __init__(self, kind: Kind, factor: float, window: int, unit: int) -> None:
        self._kind, self._factor, self._window, self._unit = kind, factor, window, unit
        self._shares: dict[str, Shares] = {}
        self._states: dict[str, _State] = {}
        self._everybody = _State()
        self._everybodys = Shares(window, unit)
        self._pasts = Shares(window, unit)

    def saw(self, client: str, part: int, whole: int, now: float, *, is_reference: bool) -> None:
        shares = self._shares.setdefault(client, Shares(self._window, self._unit))
        state = self._states.setdefault(client, _State())
        self._expire(now)
        state.seen = now
        observation = shares.add(part, whole, is_reference=is_reference)
        if observation is None:
            return
        share, is_reference = observation
        others = self._others(client)
        was_alarmed = state.alarm is not None
        if not was_alarmed and is_reference and shares.has_past:
            self._see_everybody(share, shares.past, now)
        shares.take(share, is_reference=is_reference and not was_alarmed)
        if others is not None:
            self._see(state, client, shares, share, now, others)

    def active(self, now: float) -> list[Alarm]:
        self._expire(now)
        states = [self._everybody, *self._states.values()]
        return [state.alarm for state in states if state.alarm is not None]

    def _see(
        self, state: _State, client: str | None, shares: Shares, share: float, now: float, measure: "_Measure"
    ) -> None:
        """An alarm begins, or ends once a whole window is nearer to what is usual than to the limit."""
        value = fmean(shares.latest)
        if state.alarm is None:
            state.evidence.see(measure.of(share), measure.limit)
            if state.evidence.is_strong:
                state.raise_alarm(Alarm(self._kind, client, now, value, measure.reference))
                shares.reference.clear()  # it is no measure of others, nor will be until the alarm ends
            return
        state.since_alarm += 1
        seen = fmean(map(measure.of, shares.latest))
        if state.since_alarm >= self._window and seen >= (measure.limit + measure.usual) / 2:
            state.end_alarm()
        else:
            state.alarm = Alarm(self._kind, client, state.alarm.since, value, measure.reference)

    def _see_everybody(self, share: float, past: float, now: float) -> None:
        """Each request beside its own client's past, so that it is no alarm when another mix of clients comes."""
        self._everybodys.take(share, is_reference=True)
        self._pasts.take(past, is_reference=True)
        if past > _LEAST:
            measure = _Measure(fmean(self._pasts.latest), most=2 * past, usual=0.5, limit=self._factor / 2)
            self._see(self._everybody, None, self._everybodys, share, now, measure)

    def _others(self, client: str) -> "_Measure | None":
        """None: there are none, or they have nothing that a client could lack."""
        others = [
            shares.reference
            for name, shares in self._shares.items()
            if name != client and len(shares.reference) >= self._window // 4
        ]
        reference = median(map(fmean, others)) if others else 0.0
        if reference <= _LEAST:
            return None
        means = [fmean(min(share / reference, 1.0) for share in shares) for shares in others]
        usual, count = median(means), len(means)
        spread = 1.48 * median(abs(mean - usual) for mean in means)  # as a normal distribution's deviation
        variance = (_WORTH * _DEVIATION**2 + count * spread**2) / (_WORTH + count)
        error = variance * (1 + 1 / count) + _OF_REQUESTS**2 / sum(map(len, others))
        limit = min(self._factor * usual, usual - _DEVIATIONS * error**0.5)
        return _Measure(reference, most=reference, usual=usual, limit=limit)

    def _expire(self, now: float) -> None:
        for state in self._states.values():
            if state.alarm is not None and now - state.seen > _FORGOTTEN:
                state.end_alarm()


class _Agreement:
    """The share of shadowed tokens that full depth chooses, too, beside a fixed limit."""

    def __init__(self, limit: float, window: int) -> None:
        self._limit, self._window = limit, window
        self._shares, self._state = Shares(window, _JUDGED), _State()

    def judged(self, agreeing: int, tokens: int, now: float) -> None:
        observation = self._shares.add(agreeing, tokens, is_reference=True)
        if observation is None:
            return
        share, _ = observation
        self._shares.take(share, is_reference=True)
        state, value = self._state, fmean(self._shares.latest)
        if state.alarm is None:
            state.evidence.see(share, self._limit)
            if state.evidence.is_strong:
                state.raise_alarm(Alarm("agreement", None, now, value, self._limit))
            return
        state.since_alarm += 1
        if state.since_alarm >= self._window and value >= self._limit + 0.2 * (1 - self._limit):
            state.end_alarm()
        else:
            state.alarm = Alarm("agreement", None, state.alarm.since, value, self._limit)

    def active(self) -> list[Alarm]:
        return [] if self._state.alarm is None else [self._state.alarm]
