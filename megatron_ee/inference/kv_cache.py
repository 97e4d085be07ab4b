"""Keys and values of a batch's sequences, for every layer and for exit heads that attend.

Shapes: A attentions, M places, which are positions of blocks, G key-value heads of this rank, D head dimension, T
positions, N rows, B sequences, X blocks of a sequence, Y all vectors of an attention.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_ee.inference import large_pages
from megatron_ee.inference.blocks import Blocks
from megatron_ee.model.masks import Window
from megatron_ee.model.stage import Stage


class KeyValueCache:
    """Room for the positions of all blocks; which of them are there, a ledger knows.

    After them come one block that is always zeros, for what attention reads beyond the end of a sequence, and a place
    to write what nobody reads.

    Attributes:
        blocks: who has which.
        heads: G.
        group: query heads of each key-value head.
        windows: the number of each attention (see `Stage.attention_windows`) -> its window.
        positions_M: 0, 1, ..., int64 on the device.
        nowhere: the place that nobody reads.
    """

    def __init__(self, stage: Stage, blocks: Blocks) -> None:
        config = stage.config
        self.blocks = blocks
        self.heads = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        self.group = config.num_attention_heads // config.num_query_groups
        parameter = next(stage.parameters())
        self._device, self._group = parameter.device, stage.tp_group
        self.windows: Mapping[int, Window] = stage.attention_windows
        self.nowhere = blocks.num_positions + blocks.size

        # Zeros: what attention masks out it still multiplies, by 0, and memory as found may hold NaN; see `clear`.
        shape = (len(self.windows), 1, self.heads, 2, self.nowhere + 1, config.kv_channels)
        if parameter.device.type == "cpu":
            rooms = large_pages.zeros(shape, parameter.dtype)
        else:
            rooms = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        self._first_X = torch.arange(self.heads * 2, device=parameter.device) * (self.nowhere + 1)
        self._rooms_A1G2MD = rooms
        self._rooms_1G2MD = dict(zip(self.windows, rooms, strict=True))
        self._vectors_YD = {attention: room.view(-1, room.shape[-1]) for attention, room in self._rooms_1G2MD.items()}
        self.positions_M = torch.arange(blocks.num_positions, device=parameter.device)

    def of(self, attention: int) -> torch.Tensor:
        """Keys, then values, [1, G, 2, M, D], of one attention."""
        return self._rooms_1G2MD[attention]

    def vectors_of(self, attention: int) -> torch.Tensor:
        """The same as a list of vectors, [Y, D], for `vectors_at`."""
        return self._vectors_YD[attention]

    def vectors_at(self, places_N: torch.Tensor) -> torch.Tensor:
        """Where the keys and values of rows belong, among the vectors of an attention: [N * G * 2]."""
        return (self._first_X + places_N[:, None]).flatten()

    def where(self, slot: int, positions: range) -> slice | torch.Tensor:
        """The places of a sequence's positions: a slice where they follow each other."""
        places = self.blocks.places(slot, positions)
        if isinstance(places, range):
            return slice(places.start, places.stop)
        return torch.tensor(places, dtype=torch.int64, device=self._device)  # also where there are none

    def read(self, attention: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, T, D] of the first positions of one sequence; no copy where its blocks follow each
        other."""
        room_G2MD = self.of(attention)[0]
        keys_GTD, values_GTD = room_G2MD[:, :, self.where(slot, range(length))].unbind(1)
        return keys_GTD, values_GTD

    def to_write(self, places: slice) -> Mapping[int, torch.Tensor]:
        """Keys and values [N, G, 2, D] at neighbouring places, by attention: views, of which those of all attentions
        take as long as those of two, one by one."""
        room_ANG2D = self._rooms_A1G2MD[:, 0, :, :, places].permute(0, 3, 1, 2, 4)
        return dict(zip(self.windows, room_ANG2D.unbind(), strict=True))

    def to_read(self, places: slice) -> Mapping[int, tuple[torch.Tensor, ...]]:
        """The same as keys, and values, each [1, G, T, D]."""
        return self._parts_of_all(self._rooms_A1G2MD[..., places, :])

    def blocks_of(self, slots: Sequence[int], length: int) -> torch.Tensor:
        """int64 [B, X], on the CPU: the blocks that hold so many positions of sequences; where one has fewer, the block
        of zeros."""
        num_blocks = -(-length // self.blocks.size)
        table_BX = self.blocks.table_PX[np.asarray(slots), :num_blocks]
        if table_BX.shape[1] < num_blocks:  # longer than all that there is
            table_BX = np.pad(
                table_BX, ((0, 0), (0, num_blocks - table_BX.shape[1])), constant_values=self.blocks.num_blocks
            )
        return torch.from_numpy(table_BX)

    def places_of(self, blocks_BX: torch.Tensor, length: int) -> torch.Tensor:
        """Where the first positions of sequences are, int64 [B * T]."""
        within_S = self.positions_M[: self.blocks.size]
        return (blocks_BX[:, :, None] * self.blocks.size + within_S).flatten(1)[:, :length].flatten()

    def spaced(self, first: int, spacing: int, count: int, length: int) -> Mapping[int, tuple[torch.Tensor, ...]]:
        """Keys, and values, each [B, G, T, D], of sequences that begin at places at equal distances, by attention: no
        copy."""
        num_attentions, _, num_heads, _, _, head_dim = self._rooms_A1G2MD.shape
        per_attention, _, per_head, per_part, per_place, _ = self._rooms_A1G2MD.stride()
        rooms_ABG2TD = self._rooms_A1G2MD.as_strided(
            (num_attentions, count, num_heads, 2, length, head_dim),
            (per_attention, spacing * per_place, per_head, per_part, per_place, 1),
            self._rooms_A1G2MD.storage_offset() + first * per_place,
        )
        return self._parts_of_all(rooms_ABG2TD)

    def _parts_of_all(self, rooms_ABG2TD: torch.Tensor) -> Mapping[int, tuple[torch.Tensor, ...]]:
        keys_ABGTD, values_ABGTD = rooms_ABG2TD.unbind(3)
        return dict(zip(self.windows, zip(keys_ABGTD.unbind(), values_ABGTD.unbind(), strict=True), strict=True))

    def picked(self, attention: int, places_X: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        """Keys and values, each [B, G, T, D], of places [B * T] wherever they are: a copy."""
        room_G2MD = self.of(attention)[0]
        picked_G2XD = room_G2MD.index_select(2, places_X)
        return picked_G2XD.view(self.heads, 2, -1, length, picked_G2XD.shape[-1]).permute(2, 0, 1, 3, 4).unbind(2)

    def copy(self, blocks: Sequence[int], to: Sequence[int]) -> None:
        """Copy whole blocks, of all attentions; they may be among those that are overwritten."""
        if blocks and list(blocks) != list(to):
            self._rooms_A1G2MD[..., self._places(to), :] = self._rooms_A1G2MD[..., self._places(blocks), :]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """See `clear`."""
        if blocks:
            self._rooms_A1G2MD[..., self._places(blocks), :] = 0

    def are_finite(self, blocks: Sequence[int]) -> bool:
        """Whether nothing in them is NaN or infinite, on any tensor-parallel rank."""
        are_finite = self._rooms_A1G2MD[..., self._places(blocks), :].isfinite().all()
        if self._group.size() > 1:
            dist.all_reduce(flag := are_finite.int(), op=dist.ReduceOp.MIN, group=self._group)
            return bool(flag)
        return bool(are_finite)

    def _places(self, blocks: Sequence[int]) -> torch.Tensor:
        blocks_1X = torch.tensor([list(blocks)], device=self._device)
        return self.places_of(blocks_1X, len(blocks) * self.blocks.size)

    def clear(self, slot: int, positions: range) -> None:
        """Zeros again at positions of a slot that are forgotten: what overflowed there would be NaN in what comes
        after, which multiplies by 0 what lies beyond it."""
        self._rooms_A1G2MD[:, 0, :, :, self.where(slot, positions)] = 0

    @property
    def num_bytes(self) -> int:
        return self._rooms_A1G2MD.nbytes
