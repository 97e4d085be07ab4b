"""How fast a run goes, and what share of its GPUs' peak that is."""

import torch

from megatron_ee.config import Config
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.products import (
    BACKWARD,
    MULTIPLY_AND_ADD,
    head_products,
    layer_products,
    positions_seen,
)

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


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Forward and backward of one token of training: the matrix products of all layers, and of every exit's head.

    Attention counts all pairs of positions, as in the usual definition of MFU (PaLM, arXiv 2204.02311, appendix B), or
    those within a window.
    What is recomputed doesn't count. Where only exits are trained, the layers up to the last one count their forward.
    """
    model, length = config.model, config.data.sequence_length
    layers = config.depth * layer_products(model, positions_seen(model, length, range(1, config.depth + 1)))
    heads = sum(
        head_products(model, config.exits.head_of(layer), positions_seen(model, length, [layer]), vocab_size)
        for layer in config.trained_exits
    )
    backward = BACKWARD if config.training.trains == "all" else 0
    return float(MULTIPLY_AND_ADD * ((1 + backward) * layers + (1 + BACKWARD) * heads))


def peak_flops(device_name: str) -> float | None:
    """What a GPU of this name does at most per second in bf16; None where the table doesn't have it."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)


class Throughput:
    """Turns the time of a step into figures.

    Args:
        vocab_size: the resolved size.
    """

    def __init__(self, config: Config, mesh: Mesh, *, vocab_size: int) -> None:
        self._mesh = mesh
        self._tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self._flops_per_token = flops_per_token(config, vocab_size)

    def figures(self, step_s: float, *, steps_left: int) -> dict[str, float]:
        """
        Args:
            step_s: seconds that a step takes.
        """
        tokens_per_s = self._tokens_per_step / step_s
        return {
            "perf/tokens_per_s": tokens_per_s,
            "perf/iter_time_s": step_s,
            "perf/seconds_left": steps_left * step_s,
            **self._per_gpu(tokens_per_s),
        }

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
