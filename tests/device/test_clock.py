"""Clocks: the host's, and one of CUDA events, which here are as they would be on a device that lags behind."""

import pytest
import torch
from helpers.cuda import FakeEvents

from megatron_ee.device import Device
from megatron_ee.device.clock import CudaClock


def test_on_the_cpu_a_mark_has_passed_at_once(cpu: Device) -> None:
    clock = cpu.clock()
    begin, end = clock.mark(), clock.mark()
    assert clock.has_passed(end)
    assert 0 <= clock.seconds(begin, end) < 1


def test_cuda_events_are_read_in_seconds_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    events = FakeEvents(monkeypatch)
    clock = CudaClock()
    marks = [clock.mark()]
    events.now = 0.25
    marks.append(clock.mark())
    assert not clock.has_passed(marks[1])
    clock.wait(marks[1])
    assert events.num_waits == 1
    assert clock.has_passed(marks[1])
    assert clock.seconds(*marks) == 0.25
    clock.release(marks)
    assert {clock.mark(), clock.mark()} == set(marks)
    clock.mark()
    assert events.num_made == 3


def test_a_gpu_has_a_clock_of_events() -> None:
    device = Device(torch.device("cuda", 0), "nccl", False, "")
    assert isinstance(device.clock(), CudaClock)
