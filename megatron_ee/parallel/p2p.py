"""Point-to-point messages between neighbouring stages, over gloo or NCCL."""

from collections.abc import Hashable
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
    """Sends without waiting, and holds each tensor until somebody who knows that it has arrived says so."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, tuple[dist.Work, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, name: Hashable, tensor: torch.Tensor, *, to: int, group: dist.ProcessGroup) -> None:
        """Start sending; `to` is a global rank."""
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, dst=to, group=group)
        assert work is not None, "both ends are in the group"
        self._under_way[name] = work, tensor

    def finish(self, name: Hashable) -> None:
        """Wait until a send has left, and let go of its tensor."""
        work, _ = self._under_way.pop(name)
        work.wait()

    def flush(self) -> None:
        """Wait until all has left."""
        for name in list(self._under_way):
            self.finish(name)


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
