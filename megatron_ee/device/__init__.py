"""The one place that knows whether a run is on CPUs or on GPUs. Choose the device before megatron-core is imported."""

import gc
import importlib.util
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_ee.device.clock import Clock, CudaClock, HostClock
from megatron_ee.device.cpu_view import install_cpu_view
from megatron_ee.errors import FieldError

__all__ = ["Clock", "Device", "DeviceError", "choose_device"]


class DeviceError(FieldError):
    """The device that the config asks for is not there."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where this process computes.

    Attributes:
        torch: where its tensors live.
        backend: the torch.distributed backend, nccl or gloo.
        has_transformer_engine: whether Transformer Engine's layers are used instead of megatron-core's own.
        reason: one line for the log: what was chosen and why.
    """

    torch: torch.device
    backend: Literal["nccl", "gloo"]
    has_transformer_engine: bool
    reason: str

    def synchronize(self) -> None:
        """Wait until all submitted work is done, so that a clock reads what it should. Not for messages under way,
        which have streams of their own: one that is awaited ahead may need what comes next."""
        if self.torch.type == "cuda":
            torch.cuda.current_stream(self.torch).synchronize()

    def free_memory(self) -> None:
        """Give back what objects held that nobody has any more: at once, in cycles too, and what torch keeps of it."""
        gc.collect()
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()

    def clock(self) -> Clock[Any]:
        """Times of what is done here, for which nothing waits."""
        return CudaClock() if self.torch.type == "cuda" else HostClock()

    @property
    def gpu_name(self) -> str | None:
        """The GPU's name as its driver gives it; None on a CPU."""
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else None

    def peak_memory_bytes(self) -> int:
        """The most that this process has held so far: of the GPU's memory in tensors, on a CPU of the machine's."""
        if self.torch.type == "cuda":
            return torch.cuda.max_memory_allocated(self.torch)
        return _peak_resident_bytes()


def choose_device(choice: Literal["auto", "cpu", "cuda"]) -> Device:
    """Settle on CPU or CUDA for this process and prepare megatron-core for it.

    `auto` takes CUDA only when every local rank has a GPU of its own; torchrun says which rank this is.

    Raises:
        DeviceError: `cuda` was asked for and there are fewer GPUs than local ranks, or Transformer Engine is broken.
    """
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = f"{num_ranks} local rank{'s' * (num_ranks != 1)}, {num_gpus} GPU{'s' * (num_gpus != 1)}"
    if choice == "cuda" and num_gpus < num_ranks:
        raise DeviceError("device", f"cuda needs a GPU for every local rank; found {counts}")
    if choice == "cpu" or num_gpus < num_ranks:
        install_cpu_view()
        return Device(torch.device("cpu"), "gloo", False, f"device: CPU ({choice}: {counts})")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    has_engine = _has_transformer_engine()
    layers = "Transformer Engine's layers" if has_engine else "megatron-core's own layers"
    reason = f"device: CUDA ({choice}: {counts}), {layers}"
    return Device(torch.device("cuda", index), "nccl", has_engine, reason)


def _has_transformer_engine() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # built for another CUDA, say
        raise DeviceError("device", f"Transformer Engine is installed, but cannot be imported: {error}") from error
    return True


def _peak_resident_bytes() -> int:
    """Linux's own mark first: the one of getrusage outlives exec, so that a process starts with its parent's."""
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
