"""scripts/decode.sh: as many processes as stages, one message for what is wrong, and the ranks' own exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.saved import save_random_run

from megatron_ee.parallel.mesh import Mesh

_SCRIPT = Path(__file__).parents[2] / "scripts/decode.sh"


@pytest.fixture
def run(tmp_path: Path, mesh: Mesh) -> Path:
    save_random_run(tmp_path / "run", mesh, layers=[2, 5])
    return tmp_path / "run"


def _decode(run: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(_SCRIPT), "--checkpoint", str(run), "--prompt", "early", *arguments]
    own = {name: value for name, value in os.environ.items() if name not in ("NNODES", "NPROC_PER_NODE")}
    return subprocess.run(
        command,
        env={**own, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_stages_are_processes_and_the_first_one_prints(run: Path, tmp_path: Path) -> None:
    settings = ("inference.sampling.max_new_tokens=5", "inference.sampling.ignore_eos=true", "device=cpu")
    done = _decode(run, "--output", str(tmp_path / "texts.jsonl"), "inference.parallel.pipeline=2", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("tokens by exit layer") == 1
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 1


def test_a_file_that_cannot_be_written_is_one_cause(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "nowhere/texts.jsonl"
    done = _decode(run, "--output", str(output), "inference.parallel.pipeline=2", "device=cpu")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{output}: No such file or directory\n")
    assert "does not answer" not in done.stderr


@pytest.mark.parametrize(
    ("told", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_script_that_is_told_to_end_leaves_no_process(run: Path, told: signal.Signals, status: int) -> None:
    settings = ["inference.sampling.max_new_tokens=20000", "inference.sampling.ignore_eos=true", "device=cpu"]
    command = [str(_SCRIPT), "--checkpoint", str(run), "--prompt", "early", "inference.parallel.pipeline=2", *settings]
    script = subprocess.Popen(
        ["env", "--default-signal=INT", *command],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert script.stdout is not None and script.stdout.read(20)
        ranks = psutil.Process(script.pid).children(recursive=True)
        assert len(ranks) == 3, "torchrun and two ranks"
        script.send_signal(told)
        script.communicate(timeout=40)
        assert script.returncode == status
        gone, alive = psutil.wait_procs(ranks, timeout=10)
        assert len(gone) == 3 and not alive
    finally:
        script.kill()


@pytest.mark.slow
def test_what_only_the_ranks_find_is_their_status(run: Path) -> None:
    done = _decode(run, "inference.parallel.pipeline=1", "device=cpu", NPROC_PER_NODE="3")
    assert done.returncode == 2
    assert "model.num_key_value_heads: " in done.stderr or "model.num_attention_heads: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["inference.parallel.pipeline=9"], {}, "inference.parallel.pipeline"),
        (["inference.parallel.pipeline=2"], {"NPROC_PER_NODE": "3"}, "3 processes do not divide into"),
        ([], {"NNODES": "two"}, "NNODES: two is not a number of nodes"),
        (["inference.parallel.pipeline=2"], {"NNODES": "2"}, "MASTER_ADDR"),
        (["inference.parallel.pipeline=2"], {"NNODES": "2", "MASTER_ADDR": "node0"}, "NODE_RANK"),
    ],
)
def test_what_is_wrong_is_one_message(run: Path, arguments: list[str], environment: dict[str, str], said: str) -> None:
    done = _decode(run, *arguments, **environment)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr
