"""The bench itself: what it writes. Its figures are nobody's test, but for what no noise explains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.prompts import THRESHOLD
from helpers.saved import save_random_run
from helpers.tools import TOOLS

from megatron_ee.parallel.mesh import Mesh

MEASURES = [
    "server_over_generate",
    "server_first_token_ms",
    "server_beyond_generate_ms",
    "server_us_per_streamed_token",
    "server_p99_beside_slowdown",
]


def _run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOLS / "bench_server.py"), "--small", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
def test_a_small_run_writes_every_measure(tmp_path: Path, mesh: Mesh) -> None:
    save_random_run(tmp_path / "tiny", mesh, layers=[2, 5])
    output = tmp_path / "bench/server.json"
    done = _run("--checkpoint", tmp_path / "tiny", "--threshold", THRESHOLD, "--output", output)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    measures = json.loads(output.read_text())
    assert [measure["measure"] for measure in measures] == MEASURES
    for measure in measures:
        assert measure["measure"] in done.stdout
        low, high = measure["spread"]
        assert low <= measure["value"] <= high and measure["aa"] > 0
    *_, slowdown = measures
    assert slowdown["goal"] == 1.2 and slowdown["value"] < 2 * max(slowdown["aa"], 1 / slowdown["aa"])
    assert slowdown["context"]["early_share_slow"] < slowdown["context"]["early_share_normal"]


def test_no_checkpoint_is_one_message(tmp_path: Path) -> None:
    done = _run("--checkpoint", tmp_path / "none", "--output", tmp_path / "server.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "make bench-checkpoint" in done.stderr
    assert not (tmp_path / "server.json").exists()
