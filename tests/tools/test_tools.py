"""The small programs around a run, each at least once in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tools import ToolsHere

from megatron_ee.data.indexed import write_indexed
from megatron_ee.tokenizer import ByteTokenizer

TOOLS = Path(__file__).parents[2] / "tools"


def _tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def tool_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ToolsHere:
    return ToolsHere(monkeypatch, capsys)


def _record(run: Path, *lines: dict[str, float]) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _validation(iteration: int, *losses: float) -> dict[str, float]:
    return {"iteration": iteration} | {f"val/exit_{layer}/loss": loss for layer, loss in enumerate(losses, start=1)}


@pytest.mark.parametrize(
    ("losses", "status", "said"),
    [
        ([2.2, 2.0, 1.9], 0, "exit 1             2.2000  beats the bigram by 0.2000"),
        ([2.2, 2.205, 1.9], 0, "final (3 layers)   1.9000  beats"),
        ([2.5, 2.0, 1.9], 1, "exit 1             2.5000  does NOT beat the bigram"),
        ([2.0, 2.2, 1.9], 1, "exit 2 is worse than the exit before it by more than 0.01"),
        ([2.0, float("nan"), 1.9], 1, "does NOT beat the bigram"),
    ],
    ids=["good", "within tolerance", "baseline", "depth", "nan"],
)
def test_check_exits_gives_a_verdict(tmp_path: Path, losses: list[float], status: int, said: str) -> None:
    _record(tmp_path, _validation(10, 9.0, 9.0, 9.0), _validation(20, *losses))
    done = _tool("check_exits.py", tmp_path, "--baseline", 2.4, "--baseline-name", "bigram")
    assert done.returncode == status, done.stderr
    assert said in done.stdout


def test_plot_losses_draws_the_same_picture_twice(tmp_path: Path) -> None:
    training = [{"iteration": step, "train/exit_1/loss": 3 / step, "train/exit_2/loss": 2 / step} for step in (1, 2, 3)]
    _record(tmp_path, *training, _validation(3, 1.1, 0.9))
    pictures = []
    for _ in range(2):
        done = _tool("plot_losses.py", tmp_path, "--baseline", 1.5)
        assert done.returncode == 0, done.stderr
        pictures.append((tmp_path / "pictures/losses.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("tool", ["check_exits.py", "plot_losses.py"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("", "empty"), ("{}\n", ":1: not a record of figures")]
)
def test_a_run_without_figures_is_one_message(tmp_path: Path, tool: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = _tool(tool, tmp_path, "--baseline", 1)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def _config(folder: Path) -> Path:
    path = folder / "a.yaml"
    path.write_text(
        "name: a\nmodel: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}\n"
        "training: {train_iters: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    )
    return path


def test_corpus_stats_names_what_is_missing(tmp_path: Path) -> None:
    done = _tool("corpus_stats.py", _config(tmp_path), f"data.dataset={tmp_path}/none")
    message = f"data.dataset: {tmp_path}/none.bin does not exist (python-stdlib is built in)"
    assert (done.returncode, done.stderr.splitlines()) == (2, [message])


def test_corpus_stats_describes_each_dataset_of_a_blend(tmp_path: Path, tool_here: ToolsHere) -> None:
    write_indexed(tmp_path / "one", ["ab" * 50] * 2, ByteTokenizer())
    write_indexed(tmp_path / "two", ["abc"], ByteTokenizer())
    entries = [f"{{path: {tmp_path}/one, weight: 3}}", f"{{path: {tmp_path}/two, weight: 1}}"]
    done = tool_here("corpus_stats.py", _config(tmp_path), f"data.dataset=[{', '.join(entries)}]")
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.split("dataset: ")[1:]
    assert one.splitlines()[:4] == [f"{tmp_path}/one", "share: 75.0%", "documents: 2", "tokens: 202"]
    assert two.splitlines()[1:] == [
        "share: 25.0%",
        "documents: 1",
        "tokens: 4",
        "byte-bigram cross-entropy: 0.0000 nats",
    ]


def test_conversations_are_made_from_the_corpus_and_described(tmp_path: Path, tool_here: ToolsHere) -> None:
    done = _tool("make_conversations.py", tmp_path, "--count", 40)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{tmp_path}/train.jsonl: 38 conversations",
        f"{tmp_path}/valid.jsonl: 2 conversations",
    ]
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        assert question["role"] == "user" and question["content"].startswith("Complete this function:\n\ndef ")
        assert answer["role"] == "assistant" and answer["content"].strip()
    data = [f"data.dataset={tmp_path}/train.jsonl", f"data.validation={tmp_path}/valid.jsonl"]
    folder = f"data.folder={tmp_path}/data"
    done = tool_here("corpus_stats.py", _config(tmp_path), "data.format=messages", *data, folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"dataset: {tmp_path}/train.jsonl", "conversations: 38"]
    assert lines[5:7] == [f"validation: {tmp_path}/valid.jsonl", "conversations: 2"]
    missing = f"data.dataset={tmp_path}/none.jsonl"
    done = tool_here("corpus_stats.py", _config(tmp_path), "data.format=messages", missing)
    message = f"data.dataset: {tmp_path}/none.jsonl: cannot be read (No such file or directory)"
    assert (done.returncode, done.stderr.splitlines()) == (2, [message])
