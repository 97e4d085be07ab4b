"""The bench itself: what it writes. Its figures are nobody's test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/bench_io.py"
MEASURES = {
    "checkpoint": [
        "save_over_raw_write",
        "load_over_raw_read",
        "unverified_load_over_raw_read",
        "blocking_over_memory_copy",
    ],
    "start": ["data_over_step", "first_step_beyond_imports_s"],
}


@pytest.mark.parametrize("half", ["checkpoint", pytest.param("start", marks=pytest.mark.slow)])
def test_a_small_run_writes_every_measure(tmp_path: Path, half: str) -> None:
    output = tmp_path / "bench/io.json"
    command = [sys.executable, str(TOOL), "--small", "--only", half, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    measures = json.loads(output.read_text())
    assert [measure["measure"] for measure in measures] == MEASURES[half]
    for measure in measures:
        assert measure["measure"] in done.stdout
        low, high = measure["spread"]
        assert low <= measure["value"] <= high
    assert list(output.parent.iterdir()) == [output], "what was written to be measured is gone"
