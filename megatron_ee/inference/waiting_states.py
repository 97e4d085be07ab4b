"""Hidden states of positions that stopped at an exit, until a later token of their sequence takes them deeper.

Shapes: N rows, P slots, W positions of a sequence that may wait at a time, H hidden size.
"""

import torch

from megatron_ee.inference.launch import Launch


class WaitingStates:
    """Each depth has room for `room` positions of each slot; a position takes the place of the one `room` before it.

    Args:
        like: of the states' dtype, and on their device.
    """

    def __init__(self, slots: int, room: int, hidden_size: int, like: torch.Tensor) -> None:
        self._slots, self._room, self._hidden_size, self._like = slots, room, hidden_size, like
        self._by_depth: dict[int, torch.Tensor] = {}  # a batch at full depth needs none

    def write(self, depth: int, launch: Launch, x_NH: torch.Tensor) -> None:
        """Keep the states of rows, which have run `depth` layers."""
        self._of(depth).index_copy_(0, self._places(launch), x_NH)

    def read(self, depth: int, launch: Launch) -> torch.Tensor:
        """[N, H], of rows that wait there."""
        return self._of(depth).index_select(0, self._places(launch))

    def _of(self, depth: int) -> torch.Tensor:
        if depth not in self._by_depth:
            self._by_depth[depth] = self._like.new_empty(self._slots * self._room, self._hidden_size)
        return self._by_depth[depth]

    def _places(self, launch: Launch) -> torch.Tensor:
        return launch.slots_N * self._room + launch.positions_N % self._room
