"""A draw by the inverse of the cumulative distribution.

Shapes: N rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_ee.errors import UserError
from megatron_ee.inference.sampling.weights import weights_of

NO_TOKEN = -1


class NoTokenError(UserError):
    """There is nothing to choose from.

    Attributes:
        rows: where.
        reason: why, in each of them.
    """

    reason = (
        "the logits there are NaN, infinite or all ruled out (weights that are not finite, fp16 beyond its range, or "
        "stop tokens that are the whole vocabulary)"
    )

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(rows)
        self.rows = tuple(rows)

    def __str__(self) -> str:
        names = ", ".join(map(str, self.rows))
        return f"no token can be chosen in row {names} of the batch: {self.reason}"


def draw(p_NV: torch.Tensor, u_N: torch.Tensor) -> list[int]:
    """A token of each row: the first whose cumulative probability is above `u` times the row's sum.

    Args:
        p_NV: not negative; a row may sum up to anything from 1e-9 to 1, and need not be normalised.
        u_N: fp64 in [0, 1).

    Raises:
        NoTokenError: a row is NaN, infinite or zero.
    """
    tokens: list[int] = drawn(p_NV, u_N).tolist()
    if NO_TOKEN in tokens:
        raise NoTokenError([row for row, token in enumerate(tokens) if token == NO_TOKEN])
    return tokens


def drawn(p_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """The same, still on the device [N], NO_TOKEN where there is none."""
    peak_N = p_NV.amax(-1)
    reached_NV = weights_of(p_NV).cumsum_(-1)
    total_N = reached_NV[:, -1]
    aim_N = (u_N.to(p_NV.device) * total_N).long()  # below the total however it is rounded, as u is at most 1 - 2**-53
    tokens_N = torch.searchsorted(reached_NV, aim_N[:, None], right=True)[:, 0]
    return torch.where((total_N > 0) & (peak_N < math.inf), tokens_N, NO_TOKEN)


def likeliest(logits_NV: torch.Tensor) -> torch.Tensor:
    """Each row's argmax, of equals the lowest id, still on the device [N]; NO_TOKEN where that is not finite."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype in (torch.float32, torch.float64):
        return _likeliest_by_numpy(logits_NV.numpy())
    peak_N, tokens_N = logits_NV.max(-1)
    return torch.where(peak_N.abs() < math.inf, tokens_N, NO_TOKEN)


def _likeliest_by_numpy(logits_NV: np.ndarray) -> torch.Tensor:
    """Several times as fast as torch's argmax, which a token of a small model notices; and a number that is looked at
    alone, faster than an array of them."""
    tokens_N = logits_NV.argmax(-1)
    for row, token in enumerate(tokens_N.tolist()):
        if not math.isfinite(logits_NV.item(row, token)):
            tokens_N[row] = NO_TOKEN
    return torch.from_numpy(tokens_N)
