"""preprocess_data.py as a user starts it: what it prints, its errors, and what a kill leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.tokenizers import TEXTS, write_bpe

from megatron_ee.data.indexed import DatasetError, read_index, read_tokens

TOOL = Path(__file__).parents[2] / "tools/preprocess_data.py"


def _command(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def test_the_summary_ends_with_what_to_put_into_a_config(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "' + TEXTS[0] + '"}\n\n{\n')
    done = _run(path, "--output", tmp_path / "out", "--train-bpe", 270, "--json-key", "body", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no bar where there is no terminal"
    counts, trained, encoded, skipped, config = done.stdout.splitlines()
    assert re.fullmatch(r"1 documents, 3,200 bytes, \d,\d{3} tokens \(\d\.\d\d bytes/token, vocabulary 270\)", counts)
    assert re.fullmatch(r"BPE trained in \d+\.\d s", trained)
    assert re.fullmatch(r"encoded in \d+\.\d s, \d+\.\d MB/s with 2 workers", encoded)
    assert skipped == f"skipped: 1 empty (first: {path}:2), 1 not JSON (first: {path}:3)"
    assert config == f"data: {{dataset: {tmp_path}/out, tokenizer: {tmp_path}/out.tokenizer.json}}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl"], "a.jsonl:1: --json-key: no 'text' among 'texts'; did you mean 'texts'?"),
        (["none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["empty.txt"], "--output: no document in the input: 1 empty (first: empty.txt)"),
        (["a.jsonl", "--tokenizer", "t.json"], "--tokenizer: 't.json' is neither 'bytes' nor the path of a "),
        (["a.jsonl", "--output", "old"], "--output: old.bin exists; take another name, or --overwrite"),
        (["a.jsonl", "--train-bpe", "256"], "--train-bpe: 256 must be above 256: every byte is a token"),
    ],
    ids=["key", "missing", "empty", "tokenizer", "exists", "vocabulary"],
)
def test_what_a_user_got_wrong_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"texts": "a"}\n')
    Path("empty.txt").write_text("\n")
    Path("old.bin").write_text("old")
    before = sorted(tmp_path.iterdir())
    done = _run("--output", "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", ["--workers", "--train-bpe"])
def test_a_number_that_is_none_is_refused(tmp_path: Path, option: str) -> None:
    done = _run(tmp_path, "--output", tmp_path / "out", option, "0")
    assert done.returncode == 2
    assert f"argument {option}: '0' must be a positive whole number" in done.stderr


def _wait_until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _slow_job(folder: Path) -> tuple[object, ...]:
    """Arguments of a job that takes some seconds; its output goes into a folder of its own."""
    (folder / "a.jsonl").write_text((json.dumps({"text": TEXTS[0] * 30}) + "\n") * 2000)
    tokenizer = write_bpe(folder / "t.json")
    return (folder / "a.jsonl", "--output", folder / "new/out", "--tokenizer", tokenizer, "--workers", 2)


def _start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start, and wait until something has been written."""
    command = ["env", "--default-signal=INT", *_command(*arguments)]  # also for tests in the background of a shell
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_until(lambda: any(half.stat().st_size for half in folder.glob("out.*.bin")))
    return process


def test_an_interrupt_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    process = _start(tmp_path / "new", *_slow_job(tmp_path))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted; nothing was written\n")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_interrupt_is_one_message_while_the_workers_are_still_starting(tmp_path: Path) -> None:
    command = ["env", "--default-signal=INT", *_command(*_slow_job(tmp_path))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = psutil.Process(process.pid).children
    _wait_until(lambda: any("spawn_main" in " ".join(child.cmdline()) for child in children()))
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted; nothing was written\n")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_kill_in_the_middle_leaves_nothing_that_loads_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    arguments, folder = _slow_job(tmp_path), tmp_path / "new"
    process = _start(folder, *arguments)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = [half.name for half in folder.iterdir()]
    assert left and all(f".{process.pid}.tmp" in name for name in left)
    with pytest.raises(DatasetError, match="does not exist"):
        read_index(folder / "out")
    assert not psutil.wait_procs(workers, timeout=10)[1], "workers end with their parent"
    (tmp_path / "a.jsonl").write_text('{"text": "small"}\n')
    done = _run(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["out.bin", "out.idx", "out.meta.json"]
    assert len(read_tokens(folder / "out")) > 1
