"""The rows that run through layers together, and what their attentions need, made once for all layers.

A row is one position of one sequence. A launch holds rows of several sequences: of each of them one, or several that
follow each other.

Shapes: N rows, B sequences, Q most rows of one sequence, T positions attended to, P slots, C capacity, G key-value
heads, R query heads of each of these, D head dimension, H hidden size.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_ee.inference.kv_cache import KeyValueCache
from megatron_ee.model.masks import Window
from megatron_ee.model.rotary import RotationTable, turn

_FOLDED_ROWS = 64
"""Up to so many queries a key-value head, its query heads are folded into its rows, with a mask for each of them."""


class SequenceRows(NamedTuple):
    """Positions of one sequence, by its slot in the cache."""

    slot: int
    positions: range


class Launch:
    """
    Attributes:
        rows: sequence after sequence.
        num_rows: N.
        slots_N, positions_N: int64, on the device.
    """

    def __init__(self, rows: Sequence[SequenceRows], cache: KeyValueCache, rotation: RotationTable) -> None:
        self.rows, self._cache = rows, cache
        counts = [len(positions) for _, positions in rows]
        self.num_rows, self._most = sum(counts), max(counts)
        self._last_rows = {slot: last - 1 for (slot, _), last in zip(rows, accumulate(counts), strict=True)}
        self._length = max(positions.stop for _, positions in rows)
        slots = [slot for slot, positions in rows for _ in positions]
        places = [place for _, positions in rows for place in positions]
        slots_N, positions_N = torch.tensor([slots, places], device=rotation.device)
        self.slots_N, self.positions_N = slots_N, positions_N
        self._cosine, self._sine = rotation.at(positions_N)
        self._written_NX = cache.places(slots_N, positions_N)
        self._read = _Read.of([slot for slot, _ in rows], rotation.device)
        self._padded = None if len(set(counts)) == 1 else _Padding(counts, self._most, rotation.device)
        self._begins_all = all(positions.start == 0 for _, positions in rows) and self._padded is None
        self._reaches_all = all(positions.stop == self._length for _, positions in rows)
        self._masks: dict[tuple[Window, int], torch.Tensor | None] = {}

    def last_rows_of(self, counts: Mapping[int, int]) -> list[int]:
        """Where so many last rows of sequences are, by slot."""
        return [row for slot, count in counts.items() for row in self._last_rows_of(slot, count)]

    def attend(self, attention: int, qkv_NGXD: torch.Tensor, scale: float) -> torch.Tensor:
        """Rotary positions, the cache, and attention. X is R queries, a key and a value. Returns [N, G * R * D]."""
        turned_NGXD = turn(qkv_NGXD, self._cosine, self._sine)
        room_PG2CD = self._cache.of(attention)
        self._write(room_PG2CD, turned_NGXD[:, :, -2:])
        keys_BGTD, values_BGTD = self._read.from_(room_PG2CD, self._length)
        return self._attend(turned_NGXD[:, :, :-2], keys_BGTD, values_BGTD, self._cache.windows[attention], scale)

    def store(self, attention: int, kv_NG2D: torch.Tensor) -> None:
        """Rotary positions and the cache, for rows that do not attend."""
        turned_NG2D = turn(kv_NG2D, self._cosine[:, :, -2:], self._sine[:, :, -2:])
        self._write(self._cache.of(attention), turned_NG2D)

    def _last_rows_of(self, slot: int, count: int) -> range:
        last = self._last_rows[slot]
        return range(last - count + 1, last + 1)

    def _write(self, room_PG2CD: torch.Tensor, kv_NG2D: torch.Tensor) -> None:
        head_dim = kv_NG2D.shape[-1]
        room_PG2CD.view(-1, head_dim).index_copy_(0, self._written_NX, kv_NG2D.reshape(-1, head_dim))

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
        return self._begins_all and (window is None or window >= self._length)

    def _mask(self, window: Window, *, folded: int) -> torch.Tensor | None:
        """What is added to scores, [B, 1, folded * Q, T]; None: every query sees everything."""
        if window is not None and window >= self._length:
            window = None
        key = (window, folded)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, folded)
        return self._masks[key]

    def _make_mask(self, window: Window, folded: int) -> torch.Tensor | None:
        if window is None and self._most == 1 and self._reaches_all:
            return None
        positions_N = self.positions_N if self._padded is None else self._padded.spread(self.positions_N)
        positions_BQ1 = positions_N.view(len(self.rows), self._most, 1)
        seen_T = torch.arange(self._length, device=positions_N.device)
        sees_BQT = seen_T <= positions_BQ1
        if window is not None:
            sees_BQT &= seen_T > positions_BQ1 - window
        mask_BQT = torch.zeros(sees_BQT.shape, dtype=self._cosine.dtype, device=positions_N.device)
        mask_BQT.masked_fill_(~sees_BQT, -torch.inf)
        return mask_BQT.repeat(1, folded, 1)[:, None]


class _Read(NamedTuple):
    """Which slots of the cache a launch reads: neighbours without a copy, others by a copy."""

    first: int
    stop: int
    picked_B: torch.Tensor | None

    @classmethod
    def of(cls, slots: Sequence[int], device: torch.device) -> "_Read":
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            return cls(slots[0], slots[-1] + 1, None)
        return cls(0, 0, torch.tensor(slots, device=device))

    def from_(self, room_PG2CD: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values, each [B, G, T, D]."""
        if self.picked_B is None:
            return room_PG2CD[self.first : self.stop, :, :, :length].unbind(2)
        return room_PG2CD[:, :, :, :length].index_select(0, self.picked_B).unbind(2)


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
