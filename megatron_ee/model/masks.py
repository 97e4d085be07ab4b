"""What queries see: masks of a launch, made once for all of its layers, two at most.

Shapes: S query positions, T positions attended to, B sequences.
"""

from collections.abc import Collection, Mapping

import torch

Window = int | None
"""Positions that a query sees at most, its own among them; None: all up to its own."""


def training_masks(
    windows: Collection[Window], length: int, documents_BS: torch.Tensor | None, like: torch.Tensor
) -> Mapping[Window, torch.Tensor | None]:
    """Of attentions with each of these windows: a query sees what is not after it, within its window, of its own
    document. 0 where it sees a position, minus infinity elsewhere; None where it sees all that is not after it.

    A mask is S^2 numbers, for each sequence where there are documents. (Of a boolean one torch would make these numbers
    in each layer, and keep them until its backward.) It keeps torch from the fastest kernels of a GPU, which take
    lengths of documents and windows instead (torch.nn.attention.varlen): `CoreAttention` is the place to call them.

    Args:
        documents_BS: integers; positions of one document have the same. None: a sequence is one.
        like: of the queries' dtype, and on their device.

    Returns:
        Each [1 or B, 1, S, S].
    """
    narrow = {window: window if window is not None and window < length else None for window in windows}
    masks = {window: _training_mask(window, length, documents_BS, like) for window in set(narrow.values())}
    return {window: masks[narrowed] for window, narrowed in narrow.items()}


def decoding_masks(windows: Collection[Window], positions_S: torch.Tensor) -> Mapping[Window, torch.Tensor]:
    """Of attentions with each of these windows: true where a query sees a position, [S, T].

    Args:
        positions_S: int64, ascending: where the queries are. T is up to the last of them.
    """
    length = int(positions_S[-1]) + 1
    seen_T = torch.arange(length, device=positions_S.device)
    past_ST = seen_T <= positions_S[:, None]
    return {
        window: past_ST if window is None or window >= length else past_ST & (seen_T > positions_S[:, None] - window)
        for window in windows
    }


def _training_mask(
    window: Window, length: int, documents_BS: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    if window is None and documents_BS is None:
        return None
    sees_B1SS = torch.ones(1, 1, length, length, dtype=torch.bool, device=like.device).tril()
    if window is not None:
        sees_B1SS = sees_B1SS.triu(1 - window)
    if documents_BS is not None:
        sees_B1SS = sees_B1SS & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return torch.zeros(sees_B1SS.shape, dtype=like.dtype, device=like.device).masked_fill_(~sees_B1SS, -torch.inf)
