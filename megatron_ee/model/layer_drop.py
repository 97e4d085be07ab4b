"""Layers that only some samples of a micro-batch run (stochastic depth): the others are not computed at all.

Shapes: S positions, B sequences, H hidden size, K sequences that run the layer.
"""

from collections.abc import Callable, Mapping

import torch

KeptRows = Mapping[int, torch.Tensor]
"""Layer, counted from 1 -> int64 [K], ascending: the sequences of a micro-batch that run it, possibly none. Layers that
all of them run are absent."""

RunLayer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def run_kept(
    run: RunLayer, x_SBH: torch.Tensor, rows_K: torch.Tensor, *, shows_attention: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of `x_SBH` if only some rows run it: `x + M f(x)`, M being 1 for those and else 0.

    Args:
        run: the layer: its output, and the state after its attention.
        shows_attention: whether anyone reads the state after attention; of a row that skips the layer it is x.

    Returns:
        As `run` does; without `shows_attention`, the second is x.
    """
    if not len(rows_K):
        return x_SBH, x_SBH
    y_SKH, after_attention_SKH = run(x_SBH.index_select(1, rows_K))
    y_SBH = x_SBH.index_copy(1, rows_K, y_SKH)
    return y_SBH, x_SBH.index_copy(1, rows_K, after_attention_SKH) if shows_attention else x_SBH
