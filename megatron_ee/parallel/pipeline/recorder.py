"""Times the actions of a step as they run."""

import time

from megatron_ee.device import Device
from megatron_ee.parallel.pipeline.plan import Action
from megatron_ee.parallel.pipeline.timeline import Span


class Recorder:
    """An `ActionWatch` that takes each action's span, in seconds of this process's monotonic clock. It synchronises the
    device around each, so that only recorded steps pay for it."""

    def __init__(self, device: Device) -> None:
        self._device, self._start = device, 0.0
        self.spans: list[Span] = []

    def begin(self, action: Action) -> None:
        self._device.synchronize()
        self._start = time.perf_counter()

    def end(self, action: Action) -> None:
        self._device.synchronize()
        self.spans.append(Span(action, self._start, time.perf_counter()))
