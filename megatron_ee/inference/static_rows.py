"""Single rows of sequences, of which all that attention needs is computed from tensors that stay where they are: work
on them can be recorded once and repeated. `Launch` says what they compute.

Shapes: N rows, some of which may be padding; T positions attended to, B blocks that hold as many, G key-value heads, R
query heads of each of these, X the R queries, a key and a value, D head dimension.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.model.masks import Window
from megatron_ee.model.rotary import RotationTable, turn


class Extent(NamedTuple):
    """How much such rows reach.

    Attributes:
        rows: N.
        length: T.
        are_spaced: whether row n begins at n times the cache's spacing, so that it is read where it is; others read a
            copy.
    """

    rows: int
    length: int
    are_spaced: bool


class StaticRows:
    """
    Args:
        places_2N: int64: each row's position, and the place at which its keys and values are written. It may change
            between `begin` and `begin`, as may the blocks.
        blocks_NB: int64: those of each row's sequence.
    """

    def __init__(
        self,
        extent: Extent,
        places_2N: torch.Tensor,
        blocks_NB: torch.Tensor,
        cache: KeyValueCache,
        rotation: RotationTable,
    ) -> None:
        self._extent, self._places_2N, self._blocks_NB = extent, places_2N, blocks_NB
        self._cache, self._rotation = cache, rotation

    def begin(self) -> None:
        """Compute what all layers share."""
        positions_N, written_N = self._places_2N.unbind()
        self._cosine, self._sine = self._rotation.at(positions_N)
        self._written_NX = self._cache.vectors_at(written_N)
        rows, length, are_spaced = self._extent
        if are_spaced:
            self._spaced = self._cache.spaced(0, self._cache.blocks.spacing, rows, length)
        else:
            self._read_X = self._cache.places_of(self._blocks_NB, length)
        windows = {self._narrow(window) for window in self._cache.windows.values()}
        self._masks = {window: self._mask(window, positions_N) for window in windows}

    def attend(self, attention: int, qkv_NGXD: torch.Tensor, scale: float) -> torch.Tensor:
        """As `Launch.attend`."""
        turned_NGXD = turn(qkv_NGXD, self._cosine, self._sine)
        kv_XD = turned_NGXD[:, :, -2:].reshape(-1, qkv_NGXD.shape[-1])
        self._cache.vectors_of(attention).index_copy_(0, self._written_NX, kv_XD)
        keys_NGTD, values_NGTD = self._read(attention)
        mask = self._masks[self._narrow(self._cache.windows[attention])]
        context_NGRD = scaled_dot_product_attention(
            turned_NGXD[:, :, :-2], keys_NGTD, values_NGTD, attn_mask=mask, scale=scale
        )
        return context_NGRD.reshape(len(context_NGRD), -1)

    def _read(self, attention: int) -> tuple[torch.Tensor, ...]:
        """Keys and values, each [N, G, T, D]."""
        if self._extent.are_spaced:
            return self._spaced[attention]
        return self._cache.picked(attention, self._read_X, self._extent.length)

    def _narrow(self, window: Window) -> Window:
        return window if window is not None and window < self._extent.length else None

    def _mask(self, window: Window, positions_N: torch.Tensor) -> torch.Tensor:
        """What is added to scores, [N, 1, 1, T]."""
        seen_T, positions_N1 = torch.arange(self._extent.length, device=positions_N.device), positions_N[:, None]
        sees_NT = seen_T <= positions_N1
        if window is not None:
            sees_NT = sees_NT & (seen_T > positions_N1 - window)
        mask_NT = torch.zeros(sees_NT.shape, dtype=self._cosine.dtype, device=positions_N.device)
        return mask_NT.masked_fill(~sees_NT, -torch.inf)[:, None, None]
