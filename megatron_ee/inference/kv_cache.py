"""Keys and values of a batch's sequences, for every layer and for exit heads that attend.

Shapes: A attentions, P slots, C capacity, G key-value heads of this rank, D head dimension, T positions, N rows, Y all
vectors of an attention.
"""

from collections.abc import Mapping

import torch

from megatron_ee.inference import large_pages
from megatron_ee.model.masks import Window
from megatron_ee.model.stage import Stage


class KeyValueCache:
    """Room for `capacity` positions in each of `slots` slots; which of them are there, a ledger knows.

    Attributes:
        heads: G.
        group: query heads of each key-value head.
        windows: the number of each attention (see `Stage.attention_windows`) -> its window.
        positions_C: 0, 1, ..., int64 on the device.
    """

    def __init__(self, stage: Stage, slots: int, capacity: int) -> None:
        config = stage.config
        self.heads = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        self.group = config.num_attention_heads // config.num_query_groups
        parameter = next(stage.parameters())
        self.slots, self.capacity = slots, capacity
        self.windows: Mapping[int, Window] = stage.attention_windows

        # Zeros: what attention masks out it still multiplies, by 0, and memory as found may hold NaN; see `clear`.
        shape = (len(self.windows), slots, self.heads, 2, capacity, config.kv_channels)
        if parameter.device.type == "cpu":
            rooms = large_pages.zeros(shape, parameter.dtype)
        else:
            rooms = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        first_heads = torch.arange(slots * self.heads * 2, device=parameter.device) * capacity
        self._first_PX = first_heads.view(slots, -1)
        self._rooms_APG2CD = rooms
        self._rooms_PG2CD = dict(zip(self.windows, rooms, strict=True))
        self._vectors_YD = {attention: room.view(-1, room.shape[-1]) for attention, room in self._rooms_PG2CD.items()}
        self.positions_C = torch.arange(capacity, device=parameter.device)

    def of(self, attention: int) -> torch.Tensor:
        """Keys, then values, [P, G, 2, C, D], of one attention."""
        return self._rooms_PG2CD[attention]

    def vectors_of(self, attention: int) -> torch.Tensor:
        """The same as a list of vectors, [Y, D], for `places`."""
        return self._vectors_YD[attention]

    def places(self, slots_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        """Where the keys and values of rows belong, among the vectors of an attention: [N * G * 2]."""
        return (self._first_PX.index_select(0, slots_N) + positions_N[:, None]).flatten()

    def read(self, attention: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, T, D] of the first positions of one sequence."""
        keys_GTD, values_GTD = self.of(attention)[slot, :, :, :length].unbind(1)
        return keys_GTD, values_GTD

    def clear(self, slot: int, positions: range) -> None:
        """Zeros again at positions of a slot that are forgotten: what overflowed there would be NaN in what comes
        after, which multiplies by 0 what lies beyond it."""
        self._rooms_APG2CD[:, slot, :, :, positions.start : positions.stop].zero_()

    @property
    def num_bytes(self) -> int:
        return sum(room.nbytes for room in self._rooms_PG2CD.values())
