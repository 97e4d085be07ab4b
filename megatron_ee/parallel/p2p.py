"""Point-to-point messages between neighbouring stages, over gloo or NCCL."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class MessageSpec:
    """What travels between stages: hidden states x_SBH, or their gradients."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device


class Outbox:
    """Sends without waiting, and holds each tensor until it has left."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, *, to: int, group: dist.ProcessGroup) -> None:
        """Start sending; `to` is a global rank."""
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, dst=to, group=group)
        assert work is not None, "both ends are in the group"
        self._under_way.append((work, tensor))

    def flush(self) -> None:
        """Wait until all has left."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class Inbox:
    """Receives `count` messages from one rank, in the order they were sent; the next one is always awaited already."""

    def __init__(self, count: int, spec: MessageSpec, *, source: int, group: dist.ProcessGroup) -> None:
        self._to_post, self._spec, self._source, self._group = count, spec, source, group
        self._next: tuple[dist.Work, torch.Tensor] | None = None
        self._post()

    def receive(self) -> torch.Tensor:
        """Wait for the next message."""
        assert self._next is not None, "more receives than the plan has sends"
        work, tensor = self._next
        work.wait()
        self._post()
        return tensor

    def _post(self) -> None:
        self._next = None
        if self._to_post:
            self._to_post -= 1
            tensor = torch.empty(self._spec.shape, dtype=self._spec.dtype, device=self._spec.device)
            work = dist.irecv(tensor, src=self._source, group=self._group)
            assert work is not None, "both ends are in the group"
            self._next = work, tensor
