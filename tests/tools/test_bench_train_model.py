"""The bench of training on small sizes: what it reports, not how much. And bytes, which are exact."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
FIELDS = {"measure", "value", "goal", "better", "spread", "aa", "context"}
GOALS = {
    "peak_memory_ratio_exits": 1.03,
    "peak_memory_ratio_every_layer": 1.03,
    "fused_loss_time": 0.75,
    "fused_loss_memory": 0.5,
    "trainer_over_plain_loop": 1.05,
    "trainer_over_plain_loop_without_exits": 1.05,
    "trainer_over_huggingface_model": 1.1,
    "runtime_over_megatron_1f1b": 1.0,
    "runtime_over_megatron_interleaved": 0.98,
    "peak_memory_ratio_exits_2_stages": 1.03,
    "peak_memory_ratio_every_layer_2_stages": 1.03,
}


@pytest.mark.slow
def test_a_small_run_reports_every_measure(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    command = [sys.executable, str(TOOLS / "bench_train_model.py"), "--small", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    measures = json.loads(output.read_text())
    assert {measure["measure"]: measure["goal"] for measure in measures} == GOALS
    for measure in measures:
        assert measure.keys() == FIELDS
        assert measure["measure"] in done.stdout
        assert measure["better"] == ("higher" if "_over_" in measure["measure"] else "lower")
        low, high = measure["spread"]
        assert 0 < low <= measure["value"] <= high
        assert measure["aa"] > 0
        assert measure["context"].keys() >= {"torch", "megatron_core", "threads", "sizes"}
        if "memory_ratio" in measure["measure"]:
            assert 0.9 < measure["value"] < 1.1, measure


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("live_bytes").peak_bytes


def test_peak_bytes_counts_what_lives_at_once(peak_bytes: Any) -> None:
    def three_of_them() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty_like(first)
        del first
        return torch.stack([second])

    assert peak_bytes(three_of_them) == 2 * 4000


def test_peak_bytes_sees_inside_of_a_backward(peak_bytes: Any) -> None:
    weight = torch.ones(64, 32, requires_grad=True)

    def product() -> None:
        x = torch.empty(16, 64)
        y = x @ weight
        torch.autograd.backward(y, torch.empty_like(y))

    x, y, gradient = 4 * 16 * 64, 4 * 16 * 32, 4 * 64 * 32
    assert peak_bytes(product) == x + 2 * y + gradient


def test_peak_bytes_counts_what_was_left_before_and_not_what_was_needed(peak_bytes: Any) -> None:
    def before() -> torch.Tensor:
        torch.empty(1_000_000)
        return torch.empty(500)

    assert peak_bytes(lambda: torch.empty(1000), before=before) == 2000 + 4000
