"""The rows that run through layers together, and what their attentions need, made once for all layers.

A row is one position of one sequence. A launch holds rows of several sequences: of each of them one, or several that
follow each other.

Shapes: N rows, B sequences, Q most rows of one sequence, T positions attended to, G key-value heads, R query heads of
each of these, D head dimension, H hidden size.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.inference.row_places import SequenceRows, places_of
from megatron_ee.model.masks import Window
from megatron_ee.model.rotary import RotationTable, turn

_FOLDED_ROWS = 64
"""Up to so many queries a key-value head, its query heads are folded into its rows, with a mask for each of them."""
_MOST_PADDED = 1.5
"""Queries of a launch over its rows, beyond which sequences with few rows and with many attend apart."""


class Launch:
    """
    Attributes:
        rows: sequence after sequence.
        num_rows: N.
        places: where they are.
    """

    def __init__(self, rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> None:
        self.rows, self._windows, self._parts = rows, cache.windows, (cache.group, 2)
        counts = [len(positions) for _, positions in rows]
        self.num_rows, self._most = sum(counts), max(counts)
        self._length = max(positions.stop for _, positions in rows)
        self.places = places_of(rows, cache, rotation)
        self._padded = None if len(set(counts)) == 1 else _Padding(counts, self._most, rotation.device)
        self._dtype, self._device = rotation.dtype, rotation.device
        self._masks: dict[tuple[Window, int], torch.Tensor | None] = {}
        self._groups: list[_Group] = []
        if len(rows) * self._most > _MOST_PADDED * self.num_rows:
            self._groups = _groups(rows, cache, rotation)

    def last_rows_of(self, counts: Mapping[int, int]) -> list[int]:
        """Where so many last rows of sequences are, by slot."""
        stops = dict(zip((slot for slot, _ in self.rows), accumulate(len(of) for _, of in self.rows), strict=True))
        return [row for slot, count in counts.items() for row in range(stops[slot] - count, stops[slot])]

    def attend(self, attention: int, qkv_NGXD: torch.Tensor, scale: float) -> torch.Tensor:
        """Rotary positions, the cache, and attention. X is R queries, a key and a value. Returns [N, G * R * D]."""
        turned_NGXD = turn(qkv_NGXD, *self.places.rotation)
        query_NGRD, kv_NG2D = turned_NGXD.split_with_sizes(self._parts, 2)
        self.places.write(attention, kv_NG2D)
        if not self._groups:
            return self._read_and_attend(attention, query_NGRD, scale)
        context_NH = query_NGRD.new_empty(self.num_rows, query_NGRD[0].numel())
        for launch, rows_N in self._groups:
            own_NH = launch._read_and_attend(attention, query_NGRD.index_select(0, rows_N), scale)
            context_NH.index_copy_(0, rows_N, own_NH)
        return context_NH

    def store(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        """Rotary positions and the cache, for rows that do not attend."""
        cosine, sine = self.places.rotation
        self.places.write(attention, turn(kv_NG2D, cosine[:, :, -2:], sine[:, :, -2:]))

    def _read_and_attend(self, attention: int, query_NGRD: torch.Tensor, scale: float) -> torch.Tensor:
        keys_BGTD, values_BGTD = self.places.read(attention, self._length)
        return self._attend(query_NGRD, keys_BGTD, values_BGTD, self._windows[attention], scale)

    def _attend(
        self,
        query_NGRD: torch.Tensor,
        keys_BGTD: torch.Tensor,
        values_BGTD: torch.Tensor,
        window: Window,
        scale: float,
    ) -> torch.Tensor:
        num, heads, group, head_dim = query_NGRD.shape
        queries, most = len(self.rows), self._most
        if self._padded is not None:
            query_NGRD = self._padded.spread(query_NGRD)
        if most == 1:
            mask = self._mask(window, folded=1)
            context_BGRD = scaled_dot_product_attention(query_NGRD, keys_BGTD, values_BGTD, attn_mask=mask, scale=scale)
            return context_BGRD.reshape(num, -1)
        query_BGRQD = query_NGRD.view(queries, most, heads, group, head_dim).permute(0, 2, 3, 1, 4)
        if most * group <= _FOLDED_ROWS:
            context = scaled_dot_product_attention(
                query_BGRQD.reshape(queries, heads, group * most, head_dim),
                keys_BGTD,
                values_BGTD,
                attn_mask=self._mask(window, folded=group),
                scale=scale,
            )
        else:
            mask = None if self._is_causal(window) else self._mask(window, folded=1)
            context = scaled_dot_product_attention(
                query_BGRQD.reshape(queries, heads * group, most, head_dim),
                keys_BGTD,
                values_BGTD,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=group > 1,
            )
        context_NH = (
            context.view(queries, heads, group, most, head_dim)
            .permute(0, 3, 1, 2, 4)
            .reshape(queries * most, heads * group * head_dim)
        )
        return context_NH if self._padded is None else self._padded.gather(context_NH)

    def _is_causal(self, window: Window) -> bool:
        begins_all = self._padded is None and all(positions.start == 0 for _, positions in self.rows)
        return begins_all and (window is None or window >= self._length)

    def _mask(self, window: Window, *, folded: int) -> torch.Tensor | None:
        """What is added to scores, [B or 1, 1, folded * Q, T]; None: every query sees everything."""
        if window is not None and window >= self._length:
            window = None
        key = (window, folded)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, folded)
        return self._masks[key]

    def _make_mask(self, window: Window, folded: int) -> torch.Tensor | None:
        if window is None and self._padded is None and all(of.stop == self._length for _, of in self.rows):
            if self._most == 1:
                return None
            shape = self._most, self._length
            hidden_QT = torch.full(shape, -torch.inf, dtype=self._dtype, device=self._device)
            return hidden_QT.triu_(self._length - self._most + 1).repeat(folded, 1)[None, None]
        positions_N = self.places.positions()
        if self._padded is not None:
            positions_N = self._padded.spread(positions_N)
        positions_BQ1 = positions_N.view(len(self.rows), self._most, 1)
        seen_T = torch.arange(self._length, device=positions_N.device)
        sees_BQT = seen_T <= positions_BQ1
        if window is not None:
            sees_BQT &= seen_T > positions_BQ1 - window
        mask_BQT = torch.zeros(sees_BQT.shape, dtype=self._dtype, device=self._device)
        mask_BQT = mask_BQT.masked_fill_(~sees_BQT, -torch.inf)
        return (mask_BQT if folded == 1 else mask_BQT.repeat(1, folded, 1))[:, None]


class _Padding:
    """Rows of sequences that have different numbers of them, in a rectangle; what is no row repeats the last one."""

    def __init__(self, counts: Sequence[int], most: int, device: torch.device) -> None:
        firsts = [last - count for last, count in zip(accumulate(counts), counts, strict=True)]
        spread = [
            first + min(place, count - 1) for first, count in zip(firsts, counts, strict=True) for place in range(most)
        ]
        places = [number * most + place for number, count in enumerate(counts) for place in range(count)]
        self._spread_BQ, self._places_N = torch.tensor(spread, device=device), torch.tensor(places, device=device)

    def spread(self, x_N: torch.Tensor) -> torch.Tensor:
        return x_N.index_select(0, self._spread_BQ)

    def gather(self, x_BQ: torch.Tensor) -> torch.Tensor:
        return x_BQ.index_select(0, self._places_N)


class _Group(NamedTuple):
    """Sequences of a launch with similar numbers of rows.

    Attributes:
        launch: of them alone.
        rows_N: where its rows are among all.
    """

    launch: Launch
    rows_N: torch.Tensor


def _groups(rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> list[_Group]:
    """1 row, 2, 3 to 8, 9 to 32, and so on."""
    firsts = accumulate((len(of) for _, of in rows), initial=0)
    by_size: dict[int, list[tuple[SequenceRows, range]]] = {}
    for of, first in zip(rows, firsts, strict=False):
        count = len(of.positions)
        size = (count - 1).bit_length() // 2 + (count > 1)
        by_size.setdefault(size, []).append((of, range(first, first + count)))
    if len(by_size) == 1:
        return []
    return [
        _Group(
            Launch([of for of, _ in group], cache, rotation),
            torch.tensor([row for _, places in group for row in places], device=rotation.device),
        )
        for _, group in sorted(by_size.items())
    ]
