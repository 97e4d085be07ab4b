"""Keys and values of one sequence, for every layer and for exit heads that attend.

Shapes: S rows of a launch, T positions up to the launch's last, G key-value heads, D head dimension; batch is 1.
"""

from collections.abc import Mapping

import torch

from megatron_ee.model.masks import Window, decoding_masks
from megatron_ee.model.stage import Stage


class KeyValueCache:
    """A `KeyValueStore` of fixed capacity. A launch's rows may be any ascending positions, not only the newest."""

    def __init__(self, stage: Stage, capacity: int) -> None:
        config = stage.config
        shape = (capacity, 1, config.num_query_groups, config.kv_channels)
        parameter = next(stage.parameters())

        def empty() -> torch.Tensor:
            return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)

        self._windows = stage.attention_windows
        self._layers = {number: (empty(), empty()) for number in self._windows}
        self._positions_S = torch.empty(0, dtype=torch.int64)
        self._masks_ST: Mapping[Window, torch.Tensor] = {}

    def begin_launch(self, positions_S: torch.Tensor) -> None:
        """Say which positions the rows of the coming layers are; int64, ascending."""
        self._positions_S = positions_S
        self._masks_ST = decoding_masks(set(self._windows.values()), positions_S)

    def extend(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the launch's rows; each sees all positions up to its own, or those of the layer's window. See
        `KeyValueStore`."""
        keys, values = self._layers[layer]
        keys[self._positions_S], values[self._positions_S] = key_SBGD, value_SBGD
        mask_ST = self._masks_ST[self._windows[layer]]
        length = mask_ST.shape[1]
        return keys[:length], values[:length], mask_ST

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [length, 1, G, D] of the first positions of a layer."""
        keys, values = self._layers[layer]
        return keys[:length], values[:length]
