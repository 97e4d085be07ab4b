"""What a measure of confidence is worth, from figures of every token at every exit: depth against agreement, and how
far its confidence is what comes true.

Shapes: E exits, ascending, N tokens, T thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 10


class Curve(NamedTuple):
    """One point a threshold, by ascending mean depth."""

    thresholds: np.ndarray
    mean_depth: np.ndarray
    agreement: np.ndarray

    def at(self, depths: Sequence[float]) -> list[float]:
        """The agreement at these mean depths, between the points of the curve where none has one."""
        return [float(value) for value in np.interp(depths, self.mean_depth, self.agreement)]


class Reliability(NamedTuple):
    """Of one exit: in each bin of confidence that has tokens, how many, their mean confidence, and the share of them on
    which the exit is right; and the expected calibration error, the mean over tokens of the gap between the two."""

    counts: list[int]
    confidence: list[float]
    right: list[float]
    error: float


def curve_of(confidences_EN: np.ndarray, agrees_EN: np.ndarray, exits: Sequence[int], num_layers: int) -> Curve:
    """Every token leaves at the first exit whose confidence reaches the threshold, and goes to full depth, where it
    agrees with itself, if none does. The thresholds are those between which something changes, 200 at most.

    Args:
        agrees_EN: whether an exit's likeliest token is the final exit's.
    """
    quantiles = np.quantile(confidences_EN, np.linspace(0, 1, 199))
    thresholds_T = np.unique([0.0, *quantiles[quantiles < 1], 1.0])[::-1]
    depths, agreements = [], []
    outcomes_EN = np.concatenate([agrees_EN, np.ones_like(agrees_EN[:1])])
    layers_E = np.array([*exits, num_layers])
    for threshold in thresholds_T:
        fires_EN = (confidences_EN >= threshold) & (threshold < 1)
        left_at_N = np.where(fires_EN.any(0), fires_EN.argmax(0), len(exits))
        depths.append(layers_E[left_at_N].mean())
        agreements.append(outcomes_EN[left_at_N, np.arange(outcomes_EN.shape[1])].mean())
    order = np.argsort(depths, kind="stable")
    return Curve(thresholds_T[order], np.array(depths)[order], np.array(agreements)[order])


def depths_between(shallowest: int, num_layers: int, count: int = 9) -> list[float]:
    """Evenly spread mean depths, from all at the first exit to full depth."""
    return [round(float(depth), 2) for depth in np.linspace(shallowest, num_layers, count)]


def reliability_of(confidences_N: np.ndarray, right_N: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """In bins of equal width (Naeini et al. 2015, as in arXiv 1706.04599)."""
    bins_N = np.minimum((confidences_N * num_bins).astype(int), num_bins - 1)
    counts, means, shares = [], [], []
    for number in range(num_bins):
        inside_N = bins_N == number
        if inside_N.any():
            counts.append(int(inside_N.sum()))
            means.append(float(confidences_N[inside_N].mean()))
            shares.append(float(right_N[inside_N].mean()))
    gaps = [count * abs(mean - share) for count, mean, share in zip(counts, means, shares, strict=True)]
    return Reliability(counts, means, shares, sum(gaps) / max(1, len(confidences_N)))


def without_cost(gates: np.ndarray, false_exit_cost: float) -> np.ndarray:
    """The probability that a gate's confidence stands for: what it is least to say r / (r + c (1 - r)) of, r."""
    return false_exit_cost * gates / (1 - gates + false_exit_cost * gates)
