"""How fast a run goes, and what share of its GPUs' peak that is.

Times are the main rank's, by its clock, and nothing is synchronised for their sake. On CUDA a phase ends when its work
has been handed over, so most of it shows in the phase that next waits for the GPU, `optimizer`; whole steps are exact.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ee.config import Config, ExitsConfig, ModelConfig
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.products import BACKWARD, MULTIPLY_AND_ADD, head_products, layer_products

PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 products per second as the vendor states them, by a part of the device's name; the first that fits."""

GIB = 2**30


def flops_per_token(model: ModelConfig, exits: ExitsConfig, *, sequence_length: int, vocab_size: int) -> float:
    """Forward and backward of one token of training: the matrix products of all layers, and of every exit's head.

    Attention counts all pairs of positions, as in the usual definition of MFU (PaLM, arXiv 2204.02311, appendix B).
    What is recomputed doesn't count.
    """
    layers = model.num_layers * layer_products(model, sequence_length)
    heads = sum(
        head_products(model, exits.head_of(layer), sequence_length, vocab_size)
        for layer in (*exits.layers, model.num_layers)
    )
    return float((1 + BACKWARD) * MULTIPLY_AND_ADD * (layers + heads))


def peak_flops(device_name: str) -> float | None:
    """What a GPU of this name does at most per second in bf16; None where the table doesn't have it."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)


class Throughput:
    """Times the phases of steps, and turns them into figures.

    Args:
        vocab_size: the resolved size.
    """

    def __init__(self, config: Config, mesh: Mesh, *, vocab_size: int) -> None:
        self._mesh = mesh
        self._tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self._flops_per_token = flops_per_token(
            config.model, config.exits, sequence_length=config.data.sequence_length, vocab_size=vocab_size
        )
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._step_seconds, self._num_steps = 0.0, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that a training step needs."""
        started = time.perf_counter()
        yield
        self._step_seconds += time.perf_counter() - started
        self._num_steps += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step, or around what comes between steps: saving."""
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def read(self, steps_left: int) -> dict[str, float]:
        """Figures since the last read: seconds are means per step; a checkpoint's are those of the one just before."""
        per_step = self._step_seconds / self._num_steps
        tokens_per_s = self._tokens_per_step / per_step
        figures = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/iter_time_s": per_step,
            "perf/seconds_left": steps_left * per_step,
            **self._per_gpu(tokens_per_s),
        }
        for name, seconds in self._seconds.items():
            figures[f"time/{name}_s"] = seconds if name == "checkpoint" else seconds / self._num_steps
        self._seconds.clear()
        self._step_seconds, self._num_steps = 0.0, 0
        return figures

    def _per_gpu(self, tokens_per_s: float) -> dict[str, float]:
        """Nothing on CPUs: they have no peak worth the name, and share it with whatever else runs."""
        name = self._mesh.device.gpu_name
        if name is None:
            return {}
        tokens_per_s_per_gpu = tokens_per_s / self._mesh.world_size
        flops_per_s = tokens_per_s_per_gpu * self._flops_per_token
        figures = {"perf/tokens_per_s_per_gpu": tokens_per_s_per_gpu, "perf/tflops_per_gpu": flops_per_s / 1e12}
        if (peak := peak_flops(name)) is not None:
            figures["perf/mfu"] = flops_per_s / peak
        return figures


def peak_memory(mesh: Mesh) -> dict[str, float]:
    """The highest use of memory so far, in GiB: of all ranks, and of each stage's. Collective."""
    peaks = torch.zeros(mesh.world_size, dtype=torch.float64, device=mesh.device.torch)
    peaks[mesh.rank] = mesh.device.peak_memory_bytes() / GIB
    by_stage = mesh.sum_over_ranks(peaks).view(mesh.pipeline_size, -1).amax(1).tolist()
    return {"memory/peak_gib": max(by_stage)} | {
        f"memory/stage_{stage}_peak_gib": peak for stage, peak in enumerate(by_stage)
    }
