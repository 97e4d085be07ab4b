"""Counted FLOPs against torch's own count of the real model, and figures from the time of a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import whole_model
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ee.device import Device
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.training.observation.throughput import Throughput, flops_per_token, peak_flops


def _count(exits: list[int], head: str = "norm") -> float:
    config = tiny_config(exits={"layers": exits, "head": head})
    return flops_per_token(config, VOCAB_SIZE)


def test_hand_count_of_the_tiny_model() -> None:
    query, key_value, output = 32 * 32, 2 * 32 * 16, 32 * 32  # 4 heads of 8 channels read 2 key-value heads
    swiglu = 3 * 32 * 48
    attention = 2 * SEQUENCE_LENGTH * 32
    layer = query + key_value + output + swiglu + attention
    assert _count([2, 5]) == 3 * 2 * (8 * layer + 3 * 32 * VOCAB_SIZE)


def test_a_query_counts_what_its_window_shows() -> None:
    """4 positions in three layers, and in the block of the exit after one of them; all elsewhere."""
    model = {"sliding_window": 4, "sliding_window_layers": [1, 2, 7]}
    exits = {"layers": [2, 5], "head": "block"}
    full, windowed = (flops_per_token(tiny_config(model=fields, exits=exits), VOCAB_SIZE) for fields in ({}, model))
    assert full - windowed == pytest.approx(3 * 2 * (3 + 1) * 2 * (SEQUENCE_LENGTH - 4) * 32)
    tuned = {"exits": exits, "training": {"trains": "exits"}, "checkpoint": {"initial": "runs/whole"}}
    full, windowed = (flops_per_token(tiny_config(model=fields, **tuned), VOCAB_SIZE) for fields in ({}, model))
    assert full - windowed == pytest.approx(2 * (2 + 3) * 2 * (SEQUENCE_LENGTH - 4) * 32)


@pytest.mark.parametrize("exits", [[], [2, 5]])
def test_count_is_that_of_the_products_which_torch_runs(mesh: Mesh, exits: list[int]) -> None:
    stage = whole_model(mesh, exits=exits).train().requires_grad_(True)
    tokens_BS = torch.zeros(3, SEQUENCE_LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts the others' kernels not
        positions = torch.arange(SEQUENCE_LENGTH)
        _, taps = stage.run_layers(stage.embed(tokens_BS), positions, 0, 8)
        torch.autograd.backward([stage.exit_logits(x_SBH, tap.layer, positions).sum() for tap, x_SBH in taps.items()])
    assert counter.get_total_flops() == pytest.approx(_count(exits) * tokens_BS.numel(), rel=0.01)


def test_each_exit_costs_its_projection_and_what_is_before_it() -> None:
    assert _count([2, 5]) - _count([2]) == 6 * 32 * VOCAB_SIZE
    assert _count([2, 5], "mlp") - _count([2, 5]) == 2 * 6 * 3 * 32 * 48
    assert _count([2], "block") - _count([2]) == (_count([]) - 6 * 32 * VOCAB_SIZE) / 8, "a layer"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def _figures(gpu_name: str | None) -> dict[str, float]:
    """Of steps of 2 s on four ranks."""
    mesh: Any = SimpleNamespace(device=SimpleNamespace(gpu_name=gpu_name), world_size=4)
    return Throughput(tiny_config(), mesh, vocab_size=VOCAB_SIZE).figures(2.0, steps_left=5)


def test_on_cpus_there_is_no_share_of_a_peak() -> None:
    tokens_per_s = 8 * SEQUENCE_LENGTH / 2
    assert _figures(None) == {
        "perf/tokens_per_s": tokens_per_s,
        "perf/iter_time_s": 2.0,
        "perf/seconds_left": 10.0,
    }


def test_on_gpus_there_is() -> None:
    figures = _figures("NVIDIA H200")
    per_gpu = 8 * SEQUENCE_LENGTH / 2 / 4
    assert figures["perf/tokens_per_s_per_gpu"] == per_gpu
    assert figures["perf/tflops_per_gpu"] == pytest.approx(per_gpu * _count([2, 5]) / 1e12)
    assert figures["perf/mfu"] == pytest.approx(per_gpu * _count([2, 5]) / 989e12)
    figures = _figures("NVIDIA T4")
    assert "perf/mfu" not in figures and "perf/tflops_per_gpu" in figures


def test_peak_memory_stays_up(cpu: Device) -> None:
    before = cpu.peak_memory_bytes()
    block = bytearray(before + 2**26)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert before + 2**25 < cpu.peak_memory_bytes() < 2 * before + 2**28
