"""Candidates for calibration, the most careful one first: thresholds by how often exits may be wrong.

They are chosen on texts that the test of them never sees, so they may be chosen in any way at all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from serving_heard import Heard

from megatron_ee.config import ExitParams

Way = Literal["exits", "common"]

ERRORS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
COMMON = (0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
_DIGITS = 4  # of a threshold


class Candidate(NamedTuple):
    """
    Attributes:
        name: what sets it apart from the others.
        params: to decode with.
    """

    name: str
    params: ExitParams


def candidates(texts: Sequence[Heard], base: ExitParams, exits: Sequence[int], way: Way) -> list[Candidate]:
    """Full depth first.

    Args:
        texts: what exits say of them.
        base: all but the thresholds.
        exits: those that may fire, ascending.
    """
    found = [Candidate("full depth", base.model_copy(update={"mode": "full"}))]
    common = {"mode": "early_exit", "threshold": 1.0, "exits": tuple(exits), "min_exit": 0}
    ways = _common(exits) if way == "common" else _by_exit(texts, exits)
    for name, thresholds in ways:
        if thresholds != found[-1].params.thresholds or len(found) == 1:
            found.append(Candidate(name, base.model_copy(update={**common, "thresholds": thresholds})))
    return found


def _common(exits: Sequence[int]) -> Iterator[tuple[str, dict[int, float]]]:
    for threshold in COMMON:
        yield f"threshold {threshold:g}", dict.fromkeys(exits, threshold)


def _by_exit(texts: Sequence[Heard], exits: Sequence[int]) -> Iterator[tuple[str, dict[int, float]]]:
    """Each exit as eager as it may be: of the tokens that leave there, no more than a share differ from full depth's.
    Thresholds never rise from one candidate to the next."""
    tokens = [token for text in texts for token in text.tokens]
    before = dict.fromkeys(exits, 1.0)
    for error in ERRORS:
        here = tokens
        thresholds: dict[int, float] = {}
        for layer in exits:
            said = [(token[layer].confidence, token[layer].agrees) for token in here]
            thresholds[layer] = min(before[layer], most_eager(said, error))
            here = [token for token in here if token[layer].confidence < thresholds[layer]]
        before = thresholds
        yield f"{100 * error:g} % wrong", thresholds


def most_eager(said: Sequence[tuple[float, bool]], error: float) -> float:
    """The lowest threshold at which, of the tokens that leave, at most a share differs from full depth's; 1: there is
    none. One wrong token more is counted than there are, so that a few tokens are no proof.

    Args:
        said: confidence, and whether the choice is full depth's, of each token.
    """
    threshold, wrong = 1.0, 1
    ordered = sorted(said, reverse=True)
    for number, (confidence, agrees) in enumerate(ordered, start=1):
        wrong += not agrees
        is_last_of_equals = number == len(ordered) or ordered[number][0] < confidence
        if is_last_of_equals and wrong <= error * (number + 1):
            threshold = confidence
    return min(1.0, math.floor(threshold * 10**_DIGITS) / 10**_DIGITS)


def thresholds_as_text(thresholds: Mapping[int, float]) -> str:
    """As in `2: .93, 4: never`."""
    return ", ".join(f"{layer}: {'never' if of >= 1 else f'{of:g}'}" for layer, of in thresholds.items())
