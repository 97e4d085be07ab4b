"""lm-evaluation-harness: the numbers that it gets through the server are those that it gets in process, of the same
folder by Hugging Face's own model. It runs where it is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.harness import write_tasks
from helpers.huggingface import save_model
from helpers.servers import RunningServer, start_server
from helpers.tokenizers import write_bpe_folder

pytestmark = [pytest.mark.slow]
PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable)


def _has_lm_eval() -> bool:
    return subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("hf") / "llama", "Llama", max_position_embeddings=512)
    write_bpe_folder(folder, eos_token="<|endoftext|>")
    return folder


@pytest.fixture(scope="module")
def serving(model: Path) -> Iterator[RunningServer]:
    """With exits that would change what is said, if scores were theirs."""
    running = start_server(
        model, "exits.layers=[2]", "exits.norm=shared", "inference.exit.threshold=0.0", "serving.name=x"
    )
    yield running
    assert running.end() == 0


def _results(tasks: Path, *model: str) -> dict[str, dict[str, float]]:
    command = [PYTHON, "-m", "lm_eval", *model, "--tasks", "choices,texts,answers", "--include_path", str(tasks)]
    command += ["--output_path", str(tasks / "out"), "--log_samples", "--batch_size", "1", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max((tasks / "out").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results: dict[str, dict[str, float]] = json.loads(newest.read_text())["results"]
    return {
        task: {name: value for name, value in of.items() if isinstance(value, float) and "stderr" not in name}
        for task, of in results.items()
    }


@pytest.mark.skipif(not _has_lm_eval(), reason="lm_eval is not installed (LM_EVAL_PYTHON names a Python that has it)")
def test_the_same_numbers_as_in_process(tasks: Path, model: Path, serving: RunningServer) -> None:
    arguments = f"model=x,base_url={serving.url}/v1/completions,tokenizer={model},num_concurrent=4,max_length=256"
    ours = _results(tasks, "--model", "local-completions", "--model_args", arguments)
    theirs = _results(tasks, "--model", "hf", "--model_args", f"pretrained={model},dtype=float32,max_length=256")
    print(ours)
    for task in ("choices", "texts"):
        assert ours[task] == pytest.approx(theirs[task], rel=1e-5), task
    assert ours["choices"] and ours["texts"] and "answers" in ours
