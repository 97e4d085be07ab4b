"""Tasks of lm-evaluation-harness, in process and through a server: at full depth the numbers that the harness's own
model of Hugging Face's gets of the same folder. It runs where the harness is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.harness import texts_of_tasks, write_tasks
from helpers.huggingface import save_model
from helpers.servers import RunningServer, start_server
from helpers.tokenizers import write_bpe_folder
from helpers.tools import TOOLS
from transformers import AutoModelForCausalLM, AutoTokenizer

PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable)


def _has_lm_eval() -> bool:
    return subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _has_lm_eval(), reason="lm_eval is not installed (LM_EVAL_PYTHON names a Python that has it)"
    ),
]

TASKS = ("choices", "texts", "answers")
EXITS = ("exits.layers=[2]", "exits.norm=shared")
LENGTH = 64
"""Positions of the model: some texts are longer, and lose their beginning or are cut into windows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("hf") / "llama", "Llama", max_position_embeddings=LENGTH)
    write_bpe_folder(folder, eos_token="<|endoftext|>")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Half of the answers that are right are those that the model gives, by transformers' own generate."""
    tokenizer, hf = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    answers, lengths = [], []
    for number, text in enumerate(texts_of_tasks()):
        prompt = tokenizer(text, return_tensors="pt").input_ids[:, -(LENGTH - 8) :]
        said = hf.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        lengths.append(len(tokenizer(text).input_ids))
        answers.append(tokenizer.decode(said, skip_special_tokens=True) if number % 2 else "the")
    assert min(lengths) < LENGTH < max(lengths)
    return write_tasks(tmp_path_factory.mktemp("tasks"), answers)


@pytest.fixture(scope="module")
def theirs(tasks: Path, model: Path) -> dict[str, dict[str, float]]:
    """By the harness's own model of Hugging Face's."""
    command = [PYTHON, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(tasks / "hf")]
    done = _run(command, "--batch_size", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tasks / "hf").rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(path.read_text())["results"]
    return {
        task: {
            key.partition(",")[0]: value
            for key, value in of.items()
            if isinstance(value, float) and "," in key and "stderr" not in key
        }
        for task, of in results.items()
    }


@pytest.fixture(scope="module")
def serving(model: Path) -> Iterator[RunningServer]:
    """With exits that would change what is said, if scores were theirs."""
    running = start_server(model, *EXITS, "inference.exit.threshold=0.0", "serving.name=x")
    yield running
    assert running.end() == 0


def _run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(TOOLS.parent)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=600)


def _evaluated(model: Path, tasks: Path, output: Path, *arguments: str) -> dict[tuple[str, str], Any]:
    command = [PYTHON, str(TOOLS / "evaluate.py"), str(model), "--tasks", ",".join(TASKS)]
    done = _run(command, "--include-path", str(tasks), "--output", str(output), *arguments, *EXITS)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((output / "evaluation.json").read_text())
    return {(cell["subject"], cell["mode"]): cell for cell in content["cells"]}


def test_the_same_numbers_as_hugging_face(
    tasks: Path, model: Path, theirs: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    modes = ("--modes", "full,early_exit,speculative,sled", "--thresholds", "0.01,0.02")
    ours = _evaluated(model, tasks, tmp_path, *modes)
    for task in TASKS:
        assert theirs[task] and ours[task, "full"]["figures"] == pytest.approx(theirs[task], rel=1e-5), task
        assert ours[task, "speculative"]["figures"] == ours[task, "full"]["figures"]
        assert ours[task, "full"]["mean_depth"] == 4 and ours[task, "threshold 0.01"]["mean_depth"] < 4
        assert ours[task, "threshold 0.01"]["mean_depth"] < ours[task, "threshold 0.02"]["mean_depth"]
    assert ours["texts", "threshold 0.01"]["figures"] != ours["texts", "full"]["figures"]
    assert ours["choices", "speculative"]["note"] and not ours["answers", "speculative"]["note"]
    assert ours["answers", "full"]["figures"]["exact_match"] == 0.5, "a half of the answers is the model's own"
    assert ours["answers", "threshold 0.01"]["figures"]["exact_match"] < 0.5


def test_through_a_server(
    tasks: Path, model: Path, theirs: dict[str, dict[str, float]], serving: RunningServer, tmp_path: Path
) -> None:
    ours = _evaluated(model, tasks, tmp_path, "--server", serving.url, "--thresholds", "0.01")
    for task in ("choices", "answers"):
        assert ours[task, "full"]["figures"] == pytest.approx(theirs[task], rel=1e-5), task
    assert ours["choices", "threshold 0.01"]["note"] == "full depth's: a server scores nothing else"
    assert ours["answers", "full"]["mean_depth"] == 4 and ours["answers", "threshold 0.01"]["mean_depth"] < 4


def test_no_such_task(model: Path, tasks: Path, tmp_path: Path) -> None:
    command = [PYTHON, str(TOOLS / "evaluate.py"), str(model), "--include-path", str(tasks), "--output", str(tmp_path)]
    done = _run(command, "--tasks", "choces")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert (
        "--tasks: 'choces' is no task of the harness's, nor in --include-path; did you mean 'choices'?" in done.stderr
    )
