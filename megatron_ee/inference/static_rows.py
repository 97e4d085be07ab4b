"""Single rows of sequences, of which all that attention needs is computed from tensors that stay where they are: work
on them can be recorded once and repeated. `Launch` says what they compute.

Shapes: N rows, some of which may be padding; P slots, C capacity, T positions attended to, G key-value heads, R query
heads of each of these, X the R queries, a key and a value, D head dimension.
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
        are_neighbours: whether row n is slot n, so that the cache is read where it is; others read a copy.
    """

    rows: int
    length: int
    are_neighbours: bool


class StaticRows:
    """
    Args:
        places_3N: int64: each row's slot, its position, and the position at which its keys and values are written,
            which is elsewhere for padding. It may change between `begin` and `begin`.
    """

    def __init__(self, extent: Extent, places_3N: torch.Tensor, cache: KeyValueCache, rotation: RotationTable) -> None:
        self._extent, self._places_3N, self._cache, self._rotation = extent, places_3N, cache, rotation

    def begin(self) -> None:
        """Compute what all layers share."""
        slots_N, positions_N, written_N = self._places_3N.unbind()
        self._slots_N = slots_N
        self._cosine, self._sine = self._rotation.at(positions_N)
        self._written_X = self._cache.places(slots_N, written_N)
        windows = {self._narrow(window) for window in self._cache.windows.values()}
        self._masks = {window: self._mask(window, positions_N) for window in windows}

    def attend(self, attention: int, qkv_NGXD: torch.Tensor, scale: float) -> torch.Tensor:
        """As `Launch.attend`."""
        turned_NGXD = turn(qkv_NGXD, self._cosine, self._sine)
        room_PG2CD, head_dim = self._cache.of(attention), qkv_NGXD.shape[-1]
        kv_XD = turned_NGXD[:, :, -2:].reshape(-1, head_dim)
        room_PG2CD.view(-1, head_dim).index_copy_(0, self._written_X, kv_XD)
        keys_NGTD, values_NGTD = self._read(room_PG2CD).unbind(2)
        mask = self._masks[self._narrow(self._cache.windows[attention])]
        context_NGRD = scaled_dot_product_attention(
            turned_NGXD[:, :, :-2], keys_NGTD, values_NGTD, attn_mask=mask, scale=scale
        )
        return context_NGRD.reshape(len(context_NGRD), -1)

    def _read(self, room_PG2CD: torch.Tensor) -> torch.Tensor:
        """[N, G, 2, T, D]"""
        if self._extent.are_neighbours:
            return room_PG2CD[: self._extent.rows, :, :, : self._extent.length]
        return room_PG2CD[:, :, :, : self._extent.length].index_select(0, self._slots_N)

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
