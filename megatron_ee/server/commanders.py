"""Who tells the engine what comes next: the bridge to the clients, which the first process has; what that has told, to
the others."""

import torch
import torch.distributed as dist

from megatron_ee.errors import StageLostError
from megatron_ee.server.bridge import Bridge
from megatron_ee.server.orders import Orders, orders_in, orders_out

_FIRST_BYTES = 1024
"""Of orders; mostly they hold all of them."""
_LENGTH = 8
_SOUND = 1.0
"""Seconds after which an engine that has nothing to do hears that the first process is there."""


class Alone:
    """Of the process that hears clients, if it has the whole model."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def next(self, *, is_idle: bool) -> Orders:
        return self._bridge.take(_SOUND if is_idle else 0.0)


class Leading:
    """Of the process that hears clients, where others hold parts of the model: they are told before it goes on.

    Args:
        group: of all processes, between hosts.
    """

    def __init__(self, bridge: Bridge, group: dist.ProcessGroup) -> None:
        self._bridge, self._group = bridge, group

    def next(self, *, is_idle: bool) -> Orders:
        orders = self._bridge.take(_SOUND if is_idle else 0.0)
        data = orders_out(orders)
        whole = torch.frombuffer(bytearray(len(data).to_bytes(_LENGTH, "little") + data), dtype=torch.uint8)
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        first[: len(whole)] = whole[:_FIRST_BYTES]
        _pass_on(first, self._group)
        if len(whole) > _FIRST_BYTES:
            _pass_on(whole[_FIRST_BYTES:].contiguous(), self._group)
        return orders


class Following:
    """Of all other processes."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def next(self, *, is_idle: bool) -> Orders:
        first = _pass_on(torch.empty(_FIRST_BYTES, dtype=torch.uint8), self._group)
        length = int.from_bytes(first[:_LENGTH].numpy().tobytes(), "little")
        data = first
        if (more := length + _LENGTH - _FIRST_BYTES) > 0:
            data = torch.cat([first, _pass_on(torch.empty(more, dtype=torch.uint8), self._group)])
        return orders_in(data.numpy().tobytes()[_LENGTH : _LENGTH + length])


def _pass_on(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """From the first process to all others.

    Raises:
        StageLostError: one does not answer.
    """
    try:
        dist.broadcast(tensor, src=0, group=group)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise StageLostError(f"a process of the model does not answer: {reason}") from error
    return tensor
