"""The bench itself: what it writes, and what it says where it cannot. Its figures are nobody's test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/bench_train.py"
FIELDS = {"measure", "value", "goal", "better", "spread", "aa", "context"}
MODELS = ("ee_llm_1.3b", "llama_2_7b", "llama_3_8b", "llama_3.2_1b", "gpt2_small")
SCHEDULES = ("gpipe", "1f1b", "release", "filled-1f1b", "interleaved", "zero-bubble")


def _bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--small", "--only", "pipeline", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_a_small_run_writes_every_measure_and_field(tmp_path: Path) -> None:
    output = tmp_path / "bench/train.json"
    done = _bench("--output", output)
    assert done.returncode == 0, done.stderr
    measures = json.loads(output.read_text())
    assert [measure["measure"] for measure in measures] == [
        "step_ratio_exits_p2",
        "step_ratio_exits_p2_sleeping",
        "step_ratio_exits_p4_simulated",
        "step_ratio_exits_p8_simulated",
        *(f"best_layout_ratio_{model}" for model in MODELS),
        *(f"auto_over_equal_layers_{model}" for model in MODELS),
        *(f"replay_error_{schedule}_{where}" for where in ("p2", "p2_sleeping") for schedule in SCHEDULES),
        "simulated_p8_bubble_1f1b",
        "simulated_p8_exits_ratio_1f1b",
        "simulated_p8_bubble_interleaved",
        "simulated_p8_exits_ratio_interleaved",
        "simulated_p8_bubble_filled",
        "simulated_p8_fill_gain",
        "filled_gain_p4",
        "filled_gain_p8",
        "step_ratio_fills_p2_sleeping",
    ]
    for measure in measures:
        assert measure.keys() == FIELDS
        assert measure["measure"] in done.stdout
        low, high = measure["spread"]
        assert 0 <= low <= measure["value"] <= high
        assert measure["aa"] > 0
    of = {measure["measure"]: measure for measure in measures}
    assert len(of["step_ratio_exits_p2"]["context"]["f_x_b_ms_of_stages"]) == 2
    for name in ("step_ratio_exits_p4_simulated", "step_ratio_exits_p8_simulated"):  # no noise in these
        assert of[name]["value"] == 1
        assert of[name]["context"]["inside_forward_and_backward"] > of[name]["context"]["ee_llm"] > 1
    for model in MODELS:
        for measure in (of[f"best_layout_ratio_{model}"], of[f"auto_over_equal_layers_{model}"]):
            assert measure["value"] <= measure["goal"]


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    done = _bench("--output", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"--output: {tmp_path} is a folder, not a file\n"
