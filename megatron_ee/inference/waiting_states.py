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
        places, states = launch.places.among(self._room), self._of(depth)
        if isinstance(places, slice):
            states[places] = x_NH
        else:
            states.index_copy_(0, places, x_NH)

    def read(self, depth: int, launch: Launch) -> torch.Tensor:
        """[N, H], of rows that wait there; it lasts until others wait in their places."""
        places, states = launch.places.among(self._room), self._of(depth)
        return states[places] if isinstance(places, slice) else states.index_select(0, places)

    def _of(self, depth: int) -> torch.Tensor:
        if depth not in self._by_depth:
            self._by_depth[depth] = self._like.new_empty(self._slots * self._room, self._hidden_size)
        return self._by_depth[depth]
