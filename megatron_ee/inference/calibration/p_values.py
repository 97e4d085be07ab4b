"""How well losses speak against a risk above a target. Losses are in [0, 1], independent and of one distribution.

A p-value is valid: where the risk, which is the mean of that distribution, is above the target, it is at most u with a
probability of at most u, whatever else the distribution is.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Losses = npt.NDArray[np.floating[Any]]


def hoeffding_bentkus(losses_N: Losses, target: float) -> float:
    """The smaller one of Hoeffding's and Bentkus' bounds (arXiv 2110.01052, proposition 1). It knows the mean alone, so
    losses of 0 and 1 are what it is made for.

    Args:
        target: above 0 and below 1.
    """
    count, mean = _checked(losses_N, target)
    hoeffding = math.exp(-count * _divergence(min(mean, target), target))
    bentkus = math.e * _binomial_cdf(math.ceil(round(count * mean, 9)), count, target)
    return min(1.0, hoeffding, bentkus)


def betting(losses_N: Losses, target: float) -> float:
    """By the capital of somebody who bets, loss by loss, that the risk is below the target, and never more than he has
    (arXiv 2010.09686). Where the risk is above it, his capital grows to 1 / u with a probability of at most u. What he
    puts in follows the losses before, so where they spread little, far fewer are enough.

    Args:
        target: above 0 and below 1.
    """
    _checked(losses_N, target)
    capital_N = np.cumsum(np.log1p(stakes(losses_N, target) * (target - losses_N)))
    return float(min(1.0, math.exp(-max(0.0, capital_N.max()))))


def stakes(losses_N: Losses, target: float) -> Losses:
    """What is put on each loss, as a multiple of the capital; each knows the losses before its own alone, or the bet
    would be no fair one."""
    count = len(losses_N)
    losses_N = np.asarray(losses_N, dtype=np.float64)
    after_N = np.arange(1, count + 1)
    means_N = (0.5 * target + np.cumsum(losses_N)) / (after_N + 1)
    variances_N = (0.25 * target + np.cumsum((losses_N - means_N) ** 2)) / (after_N + 1)
    known_N = np.concatenate([[0.25 * target], variances_N[:-1]])
    return np.minimum(np.sqrt(2 * math.log(1 / _BET_FOR) / (known_N * count)), _MOST / (1 - target))


_BET_FOR = 0.1
"""Stakes are those that reach this p-value soonest; it is valid whatever they are."""
_MOST = 0.9
"""Of what could be lost at a loss of 1."""


def _checked(losses_N: Losses, target: float) -> tuple[int, float]:
    assert 0 < target < 1, target
    assert losses_N.ndim == 1 and len(losses_N) > 0
    assert losses_N.min() >= 0 and losses_N.max() <= 1
    return len(losses_N), float(losses_N.mean(dtype=np.float64))


def _divergence(p: float, q: float) -> float:
    """Of a coin's `p` from `q`, in nats."""
    of_heads = p * math.log(p / q) if p > 0 else 0.0
    of_tails = (1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0
    return of_heads + of_tails


def _binomial_cdf(most: int, count: int, probability: float) -> float:
    """That of `count` coins at most so many are heads."""
    heads = np.arange(min(most, count) + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_ways = log_factorials[count] - log_factorials[heads] - log_factorials[count - heads]
    logs = log_ways + heads * math.log(probability) + (count - heads) * math.log1p(-probability)
    return float(min(1.0, np.exp(logs).sum()))
