"""What is there is kept: the tokenizer is learned once, a trained run is not trained again."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.folders import FORMAT_FILE, step_folder
from megatron_ee.tokenizer import open_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module("bench_checkpoint")
    monkeypatch.setattr(tool, "documents", lambda: iter(["early exits let a token leave early"] * 3))
    return tool


def test_the_tokenizer_is_learned_the_run_started_and_both_are_kept(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, command: started.append(command))
    overrides = [f"runs={tmp_path}", f"data.tokenizer={tmp_path}/tokenizer.json", "model.vocab_size=270"]
    monkeypatch.setattr("sys.argv", ["bench_checkpoint.py", *overrides])

    tool.main()
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size == 270
    assert capsys.readouterr().out == f"{tmp_path}/tokenizer.json: a BPE of 270 tokens, of the built-in corpus\n"
    assert started == [[str(TOOLS.parent / "scripts/train.sh"), str(tool.CONFIG), *overrides]]

    kept = (tmp_path / "tokenizer.json").stat()
    for iteration, status in ((659, None), (660, 0)):  # stopped just before its end, it goes on
        folder = step_folder(tmp_path / "checkpoint", iteration)
        folder.mkdir(parents=True)
        (folder / FORMAT_FILE).touch()
        assert tool.main() == status
    assert len(started) == 2
    assert (tmp_path / "tokenizer.json").stat() == kept
    assert capsys.readouterr().out == f"{tmp_path}/checkpoint is trained: 660 iterations\n"
