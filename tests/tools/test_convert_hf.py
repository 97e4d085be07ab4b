"""The tool's words and statuses; what it does is tested where it is done (tests/checkpoint/test_huggingface.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.huggingface import save_model, tensors_of
from safetensors.torch import save_file

TOOL = Path(__file__).parents[2] / "tools/convert_hf.py"

# Converts, and says how much memory it took at most beyond what the imports took; pages of files are not counted.
MEASURED = """
import runpy, sys
from pathlib import Path
from megatron_ee.device import choose_device
choose_device("cpu")
import megatron_ee.checkpoint.from_huggingface, megatron_ee.checkpoint.to_huggingface
def resident(name):  # not getrusage's, which begins with what the parent had
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
before = resident("VmRSS:")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("PEAK", resident("VmHWM:") - before)
"""


def _run(*arguments: object, measured: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", MEASURED] if measured else []), str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "Llama")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    done = _run("import", source, tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{source}/model.safetensors: cut off: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _save_large(folder: Path, num_layers: int) -> int:
    """A random model of 100 MB a layer, in bf16, and 64 MB of embeddings; returns its bytes."""
    save_model(
        folder,
        "Llama",
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    tensors = tensors_of(folder)
    for layer in range(1, num_layers):
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            tensors[name.replace(".0.", f".{layer}.", 1)] = torch.randn_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 1', f'"num_hidden_layers": {num_layers}'))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
def test_memory_is_that_of_a_few_pieces_however_large_the_model(tmp_path: Path) -> None:
    total = _save_large(tmp_path / "source", 22)
    assert total > 2e9
    for arguments in (
        ("import", tmp_path / "source", tmp_path / "run", "--tokenizer", "bytes"),
        ("export", tmp_path / "run", tmp_path / "again", "--shard-size", "700MB"),
    ):
        done = _run(*arguments, measured=True)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("PEAK ")[1])
        print(f"{arguments[0]}: {peak / 1e6:.0f} MB of {total / 1e6:.0f} MB")
        assert peak < 400e6, "less than a layer and half a gigabyte, and nothing of a file of 700 MB"
    source, again = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "again")
    assert source.keys() == again.keys() and all(torch.equal(source[name], again[name]) for name in source)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_what_is_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    _save_large(tmp_path / "source", 8)
    command = [sys.executable, TOOL, "import", tmp_path / "source", tmp_path / "run", "--tokenizer", "bytes"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".run.*/checkpoints/*/*.distcp")):
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == f"interrupted: {tmp_path}/run is not written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
