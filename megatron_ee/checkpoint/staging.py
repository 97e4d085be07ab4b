"""Copies of tensors in host memory, so that they can be written while training changes the originals."""

import math
from collections.abc import Sequence

import torch

from megatron_ee.device import Device

_ALIGNMENT = 64  # bytes: a cache line


class Staging:
    """Host memory that is taken once and used again by every save; page-locked where tensors come from a GPU."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the same values, shapes and dtypes. They are valid until the next call, and each is the whole of
        its storage, because torch.save writes storages.

        Raises:
            RuntimeError: there is not as much memory.
        """
        sizes = [_ALIGNMENT * math.ceil(tensor.nbytes / _ALIGNMENT) for tensor in tensors]
        if self._memory.numel() != sum(sizes):
            self._memory = torch.empty(0, dtype=torch.uint8)  # first, or both would be there for a moment
            pinned = self._device.torch.type == "cuda"
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        copies, start = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            copy = self._part(start, tensor)
            copy.copy_(tensor, non_blocking=True)
            copies.append(copy)
            start += size
        self._device.synchronize()
        return copies

    def _part(self, start: int, like: torch.Tensor) -> torch.Tensor:
        part = self._memory.numpy()[start : start + like.nbytes]  # a view by torch would share the whole storage
        return torch.from_numpy(part).view(like.dtype).view(like.shape)
