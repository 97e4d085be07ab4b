"""Memory of a CPU in large pages, where the system has them.

A token reads every weight and all keys and values once, from one end to the other. In pages of 4 KiB much of that time
goes into finding them: products with 16 MB of matrices take a fifth less in pages of 2 MiB (one core of a virtual
machine).
"""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

_PAGE = 2 << 20
_LINE = 64  # bytes; where vectors begin best
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1 and later, which Python's mmap does not name


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As torch.zeros."""
    return Arena(room_for(shape, dtype)).take(shape, dtype)


def room_for(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in an arena."""
    return -(-math.prod(shape) * dtype.itemsize // _LINE) * _LINE


def move(address: int, num_bytes: int) -> None:
    """Have memory that a library has filled lie in large pages: those that it shares with others too. Where the system
    has none to give, or moves nothing on request, all stays as it is."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start, stop = address // _PAGE * _PAGE, -(-(address + num_bytes) // _PAGE) * _PAGE
    advise = ctypes.CDLL(None).madvise
    for page in range(start, stop, _PAGE):
        advise(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _COLLAPSE)


class Arena:
    """Room for tensors that lie one after the other; it lasts as long as any of them. What was never written is zero,
    and takes no memory yet."""

    def __init__(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._taken = -self._bytes.data_ptr() % _PAGE
        self._end = self._taken + num_bytes

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros in room that is still free."""
        start, self._taken = self._taken, self._taken + room_for(shape, dtype)
        assert self._taken <= self._end, "the arena is full"
        return self._bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
