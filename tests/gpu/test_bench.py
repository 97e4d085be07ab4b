"""The bench itself, on the CPU: what it writes, and what it says without a GPU. Its figures are nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/bench_gpu.py"
DECODING = [
    f"decode_{name}_batch_{batch}"
    for batch in (1, 3)
    for name in ("tokens_per_s_full_depth", "tokens_per_s_threshold_0.5", "speed_ratio_threshold_0.5")
]
FIELDS = {"measure", "value", "goal", "better", "spread", "aa", "context"}


def _bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.slow
def test_a_small_run_on_the_cpu_writes_every_field(tmp_path: Path) -> None:
    output = tmp_path / "bench/gpu.json"
    done = _bench("--device", "cpu", "--small", "--output", output)
    assert done.returncode == 0, done.stderr
    measures = json.loads(output.read_text())
    assert [measure["measure"] for measure in measures] == [
        "train_step_ms",
        "train_tokens_per_s",
        "train_step_ratio_with_exits",
        *DECODING,
    ]
    for measure in measures:
        assert measure.keys() == FIELDS
        assert measure["measure"] in done.stdout
        assert measure["better"] in ("lower", "higher")
        low, high = measure["spread"]
        assert 0 < low <= measure["value"] <= high
        assert measure["aa"] > 0
        assert measure["goal"] is None
        assert measure["context"].keys() >= {"device", "torch", "megatron_core", "sizes"}
    assert measures[2]["context"]["flops_ratio"] > 1


def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = _bench("--output", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cuda needs a GPU for every local rank; found 1 local rank, 0 GPUs" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
