"""CUDA's events without CUDA."""

from typing import Any

import pytest
import torch


class FakeEvents:
    """Stands in for torch.cuda.Event. `now` is the time at which events are recorded, in seconds; whatever the device
    has `reached` has passed; waiting for an event makes it get there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.reached = 0.0
        self.num_made = self.num_waits = 0
        events = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing
                self.time = -1.0
                events.num_made += 1

            def record(self) -> None:
                self.time = events.now

            def query(self) -> bool:
                return self.time <= events.reached

            def synchronize(self) -> None:
                events.num_waits += not self.query()
                events.reached = max(events.reached, self.time)

            def elapsed_time(self, end: Any) -> float:
                assert self.query() and end.query(), "CUDA raises where an event has not passed"
                return 1000 * (end.time - self.time)

        patch.setattr(torch.cuda, "Event", Event)
