"""What was promised, and what it comes to on prompts that nothing was chosen by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from calibration_risks import AGAINST_FULL_DEPTH
from calibration_runs import Measured

from megatron_ee.config import ExitParams
from megatron_ee.inference.calibration.guarantees import P_VALUES, Method, choose_candidate

_SURE = 1.96  # standard errors


class Interval(NamedTuple):
    """Where the risk is, by 95 % (normal)."""

    low: float
    high: float


@dataclass(frozen=True)
class Terms:
    """What is asked for.

    Attributes:
        risk: one of `calibration_risks.RISKS`.
        delta: how often the promise may fail, over calibrations; `conformal` has none.
    """

    risk: str
    method: Method
    delta: float

    def promise(self, target: float) -> str:
        """In words."""
        if self.method == "conformal":
            return f"{self.risk} at most {target:g} on average over calibrations and the next prompt"
        return f"{self.risk} at most {target:g} on average over prompts, in {1 - self.delta:.0%} of all calibrations"


@dataclass(frozen=True)
class Promise:
    """
    Attributes:
        chosen: on the prompts of the calibration; None: nothing can be promised, not even of full depth.
        next: the first candidate that could not be shown to keep the target; None: all could.
        fresh: the chosen one on prompts that nothing was chosen by.
    """

    target: float
    chosen: Measured | None
    next: Measured | None = None
    fresh: Measured | None = None

    @property
    def params(self) -> ExitParams:
        """Full depth where nothing is promised."""
        return ExitParams(mode="full") if self.chosen is None else self.chosen.candidate.params


def choose(measured: Sequence[Measured], target: float, terms: Terms) -> Promise:
    """The most eager candidate that the losses allow.

    Args:
        measured: full depth first, then the most careful.
    """
    known = int(terms.risk in AGAINST_FULL_DEPTH)  # full depth loses nothing against itself, which needs no test
    losses_JN = np.array([of.losses_N for of in measured[known:]])
    number = choose_candidate(losses_JN, target, terms.delta, terms.method)
    kept = known - 1 if number is None else known + number
    after = kept + 1
    return Promise(target, measured[kept] if kept >= 0 else None, measured[after] if after < len(measured) else None)


def interval_of(losses_N: np.ndarray) -> Interval:
    mean, count = float(losses_N.mean()), len(losses_N)
    error = _SURE * float(losses_N.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
    return Interval(max(0.0, mean - error), min(1.0, mean + error))


def p_value_of(measured: Measured, target: float, terms: Terms) -> float | None:
    """None where the method has none."""
    of = P_VALUES.get(terms.method)
    return None if of is None else of(measured.losses_N, target)


def as_json(measured: Measured, full: Measured) -> dict[str, Any]:
    """All figures of one run."""
    low, high = interval_of(measured.losses_N)
    return {
        "name": measured.candidate.name,
        "mode": measured.candidate.params.mode,
        "thresholds": {str(layer): of for layer, of in measured.candidate.params.thresholds.items()},
        "prompts": len(measured.losses_N),
        "tokens": measured.tokens,
        "risk": measured.risk,
        "risk_interval": [low, high],
        "worst_decile": measured.worst_decile,
        "mean_depth": measured.mean_depth,
        "depths": {str(layer): count for layer, count in measured.depths.items()},
        "tokens_per_second": measured.tokens_per_second,
        "over_full_depth": measured.tokens_per_second / full.tokens_per_second,
    }


def promise_as_json(promise: Promise, full: Mapping[str, Measured], terms: Terms) -> dict[str, Any]:
    """
    Args:
        full: full depth's runs, of the prompts `calibration` and `fresh`.
    """
    chosen, fresh, after = promise.chosen, promise.fresh, promise.next
    return {
        "target": promise.target,
        "promise": terms.promise(promise.target),
        "risk": terms.risk,
        "method": terms.method,
        "delta": None if terms.method == "conformal" else terms.delta,
        "p_value": None if chosen is None else p_value_of(chosen, promise.target, terms),
        "calibration": None if chosen is None else as_json(chosen, full["calibration"]),
        "fresh": None if fresh is None else as_json(fresh, full["fresh"]),
        "next": None if after is None else as_json(after, full["calibration"]),
    }
