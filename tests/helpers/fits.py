"""Whether samples come as often as they should.

Shapes: K outcomes.
"""

import numpy as np
import torch

_FEWEST = 5.0  # expected of an outcome that is counted by itself: Pearson's approximation needs so many


def chi_square(counts_K: np.ndarray, expected_K: np.ndarray) -> float:
    """p-value of Pearson's test; 0 where something came that never should. Rare outcomes are counted together.

    Args:
        expected_K: probabilities; they sum up to 1.
    """
    assert abs(expected_K.sum() - 1) < 1e-9
    if counts_K[expected_K == 0].any():
        return 0.0
    wanted_K = expected_K * counts_K.sum()
    rare_K = wanted_K < _FEWEST
    counts, wanted = counts_K[~rare_K].astype(float), wanted_K[~rare_K]
    if wanted_K[rare_K].sum() > 0:
        counts, wanted = np.append(counts, counts_K[rare_K].sum()), np.append(wanted, wanted_K[rare_K].sum())
    if len(wanted) == 1:
        return 1.0
    square = ((counts - wanted) ** 2 / wanted).sum()
    half = torch.tensor([(len(wanted) - 1) / 2, square / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()
