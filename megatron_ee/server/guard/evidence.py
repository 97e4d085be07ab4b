"""How sure it is that a mean has fallen below a limit, request by request, whatever the distribution.

A bet against "the mean is at least m" multiplies its stake by 1 + b / (1 - m) (m - x) for each observation x in [0, 1];
while the mean is m or more, no stake grows on average (Waudby-Smith & Ramdas, arXiv 2010.09686). A stake that begins
anew whenever it has fallen below 1 reaches c no sooner than after c observations on average, and the mean of several
such stakes neither (e-detectors: Shin, Ramdas & Rinaldo, arXiv 2203.03532). Nothing is assumed of variances or shapes,
only that observations don't hang together: so one is a whole request, never a token.
"""

import math
from collections import deque

RUN_LENGTH = 100_000
"""Observations to a false alarm, on average, of a client that is exactly at the limit; of others many more."""

_BETS = (0.25, 0.5, 0.9)
_LARGEST_LIMIT = 0.999


class Evidence:
    """That a mean lies below its limit."""

    def __init__(self) -> None:
        self._logs = [0.0] * len(_BETS)

    def see(self, share: float, limit: float) -> None:
        """
        Args:
            share: an observation, in [0, 1].
            limit: known without it; at 0 or below nothing can be said.
        """
        if limit <= 0:
            return
        limit = min(limit, _LARGEST_LIMIT)
        for number, bet in enumerate(_BETS):
            gain = math.log1p(bet / (1 - limit) * (limit - share))
            self._logs[number] = max(self._logs[number], 0.0) + gain

    @property
    def is_strong(self) -> bool:
        """Whether it is enough for an alarm."""
        return sum(map(math.exp, self._logs)) >= RUN_LENGTH * len(_BETS)

    def forget(self) -> None:
        """Begin anew."""
        self._logs = [0.0] * len(_BETS)


class Shares:
    """A share of tokens, request by request. Requests of a few tokens count together, so that many of them can't hide
    a long one.

    Args:
        window: how many observations `latest` holds.
        unit: tokens that make an observation.

    Attributes:
        latest: of the latest observations.
        reference: likewise, of requests that are others' measure.
        past: their mean over a longer time.
        count: observations so far.
    """

    def __init__(self, window: int, unit: int) -> None:
        self._window, self._unit = window, unit
        self._part = self._whole = 0
        self._is_reference = True
        self.latest: deque[float] = deque(maxlen=window)
        self.reference: deque[float] = deque(maxlen=window)
        self.past = 0.0
        self.count = 0

    def add(self, part: int, whole: int, *, is_reference: bool) -> tuple[float, bool] | None:
        """An observation, once there is one, and whether it is others' measure. It is not in `latest` yet."""
        assert 0 <= part <= whole
        self._part, self._whole = self._part + part, self._whole + whole
        self._is_reference = self._is_reference and is_reference
        if self._whole < self._unit:
            return None
        observation = self._part / self._whole, self._is_reference
        self._part = self._whole = 0
        self._is_reference = True
        return observation

    def take(self, share: float, *, is_reference: bool) -> None:
        """Into the latest, and the past."""
        self.latest.append(share)
        if is_reference:
            self.reference.append(share)
            self.count += 1
            self.past += (share - self.past) / min(self.count, 16 * self._window)

    @property
    def has_past(self) -> bool:
        """Whether there is enough of it to go by."""
        return self.count >= 2 * self._window
