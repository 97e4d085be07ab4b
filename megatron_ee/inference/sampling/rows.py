"""Some rows of a batch."""

from collections.abc import Sequence

import torch


def pick(x_NV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows, in ascending order: the tensor itself where they are all, else a copy."""
    return x_NV if len(rows) == len(x_NV) else x_NV[list(rows)]
