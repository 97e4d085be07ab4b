"""Checkpoints of parameters that are read when they are written."""

import signal
import threading
from pathlib import Path

import pytest
import torch

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.config import ExitsConfig, ModelConfig

MODEL = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2)


@pytest.mark.usefixtures("cpu")
def test_an_interrupt_waits_for_what_is_being_written_and_no_more(tmp_path: Path) -> None:
    """Whoever removes the folder then finds no thread at work in it."""
    from megatron_ee.checkpoint.streaming import Streamed, write_streamed  # it imports megatron-core

    num_read, at_work, rows, lock = 0, 0, 2**20, threading.Lock()

    def read(part: slice) -> torch.Tensor:
        nonlocal num_read, at_work
        with lock:
            num_read, at_work = num_read + 1, at_work + 1
            if num_read == 3:  # all threads are at work
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(0.5)
        with lock:
            at_work -= 1
        return torch.zeros(part.stop - part.start, 64)

    parameters = [Streamed(f"layers.{layer}.weight", (rows, 64), read) for layer in range(4)]  # 16 chunks
    description = Description(MODEL, ExitsConfig(), "fp32", "bytes", 320, Progress(0, 0))
    with pytest.raises(KeyboardInterrupt):
        write_streamed(tmp_path, parameters, description, {})
    assert num_read == 3, "one in each thread"
    assert not at_work
    assert not list(tmp_path.rglob("format.json"))


@pytest.mark.usefixtures("cpu")
def test_an_interrupt_while_the_threads_are_being_started_waits_for_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ee.checkpoint.streaming import Streamed, write_streamed

    reading, read_up, start = threading.Event(), threading.Event(), threading.Thread.start

    def read(part: slice) -> torch.Tensor:
        reading.set()
        threading.Event().wait(0.5)
        read_up.set()
        return torch.zeros(part.stop - part.start, 64)

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "checkpoint" and reading.wait(0.2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    description = Description(MODEL, ExitsConfig(), "fp32", "bytes", 320, Progress(0, 0))
    with pytest.raises(KeyboardInterrupt):
        write_streamed(tmp_path, [Streamed("layers.0.weight", (2**20, 64), read)], description, {})
    assert reading.is_set() and read_up.is_set()
