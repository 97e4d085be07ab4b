"""The command, as a user gives it: in a process of its own where it starts, or is on a terminal; else in this one."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset

from megatron_ee.inference.__main__ import main, split_settings
from megatron_ee.inference.decoding_record import read_record
from megatron_ee.inference.exit_depths import read_depths
from megatron_ee.parallel.mesh import Mesh

SHORT = ("inference.sampling.max_new_tokens=6", "inference.sampling.ignore_eos=true")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh, ranks: RankPool) -> Path:
    """A run whose exits after layers 2 and 5 know a little."""
    folder = tmp_path_factory.mktemp("command")
    write_small_dataset(folder)
    ranks.run(1, train_and_save, run_config(folder, training={"train_iters": 30}))
    return folder / "runs/tiny"


def _call(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> tuple[int, str, str]:
    with patch.object(sys, "argv", ["inference", "--checkpoint", str(run), *arguments, *SHORT]):
        status = main()
    return status, *capsys.readouterr()


def _start(run: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_ee.inference", "--checkpoint", str(run), *arguments, *SHORT]


def test_prompts_are_printed_in_order_with_one_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "more.txt").write_text("deeper \nwhile ")
    status, out, err = _call(
        capsys, run, "--prompt", "early ", "--prompts", str(tmp_path / "more.txt"), "inference.exit.threshold=0.0"
    )
    assert (status, err) == (0, "")
    texts, _, table = out.rpartition("\n\n")
    assert [text[:6] for text in texts.split("\n\n")] == ["early ", "deeper", "while "]
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in table.splitlines()[:-1])
    assert rows["tokens"].startswith("18 in 3 texts, ")
    assert rows["mean depth"] == "2.00 of 8 layers"
    assert rows["tokens by exit layer"] == "2: 18"
    assert rows["layers not waited for"] == "75.0%"
    assert rows["weight bytes not read"].startswith("75.0% of the layers', ")
    assert rows["exits' heads"].startswith("asked 6 times; 0 B read beyond full depth's (0.0%), 0.0% more")
    assert rows["arithmetic saved"] == "75.0% of the layers'"


def test_texts_go_into_a_file_as_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "early "}\n{"prompt": [101, 120]}\n')
    arguments = ("--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    settings = ("inference.exit.threshold=0.2", "inference.sampling.logprobs=2", "inference.exit.max_pending=1")
    status, out, err = _call(capsys, run, *arguments, *settings)
    assert (status, err) == (0, "")
    assert out.startswith("tokens                 12 in 2 texts")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["early ", [101, 120]]
    for record in records:
        assert len(record["tokens"]) == len(record["exit_layers"]) == len(record["confidences"]) == 6
        assert record["text"] == bytes(record["tokens"]).decode()
        assert (record["finish_reason"], record["stop_reason"]) == ("length", None)
        assert [len(of["top"]) for of in record["logprobs"]] == [2] * 6
        assert "exit_logprobs" not in record


@pytest.mark.parametrize("drafts", [False, True])
def test_depths_are_counted_over_all_texts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drafts: bool
) -> None:
    """As the table has them, whether texts go to a file or not; a drafted token comes out at full depth."""
    (tmp_path / "in.txt").write_text("deeper \nwhile ")
    path = tmp_path / "depths.json"
    arguments = ["--prompt", "early ", "--prompts", str(tmp_path / "in.txt"), "--depths", str(path)]
    arguments += ["--output", str(tmp_path / "out.jsonl")] if drafts else []
    settings = ("inference.exit.mode=speculative", "inference.exit.draft_exit=2") if drafts else ()
    status, out, err = _call(capsys, run, *arguments, "inference.exit.threshold=0.2", *settings)
    assert (status, err) == (0, "")
    tokens = read_depths(path, (2, 5), 8)
    (said,) = re.findall(r"^tokens by exit layer +(.*)$", out, re.MULTILINE)
    assert said == ", ".join(f"{layer}: {count}" for layer, count in tokens.items())
    assert sum(tokens.values()) == 18
    if drafts:
        assert tokens == {8: 18}
        assert any(any(json.loads(line)["draft_exits"]) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    else:
        assert len(tokens) > 1


def test_depths_that_cannot_be_written_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = _call(capsys, run, "--prompt", "early ", "--depths", str(tmp_path))
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"{tmp_path}: ")


def test_comparing_begins_with_full_depth(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("--prompt", "early ", "--prompt", "deeper ")
    status, out, err = _call(capsys, run, *prompts, "--compare", "inference.sampling.temperature=3.0")
    assert (status, err) == (0, "")
    rows = out.splitlines()
    assert rows[0].split() == ["mean", "depth", "agreement", "tokens/s", "speed", "tokens", "by", "exit", "layer"]
    assert rows[1].split()[:4] == ["full", "depth", "8.00", "100.0%"]
    assert [row.split()[1] for row in rows[2:-1]] == ["0.95", "0.9", "0.8", "0.7", "0.5"]
    assert rows[-1].split()[:3] == ["speculative", "8.00", "100.0%"] and "accepted" in rows[-1]
    status, out, _ = _call(capsys, run, *prompts, "--compare", "--kv-policies")
    assert [row.split()[2] for row in out.splitlines()[2:5]] == ["recompute", "fill", "propagate"]
    assert len(out.splitlines()) == 2 + 15 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a" * 9, "--prompt", "b", "inference.exit.exits=[3]"], "exits.0: there is no exit after layer 3"),
        (["--prompt", "a", "inference.max_new_tokens=3"], "inference.max_new_tokens: unknown key"),
        (["--prompts", "no-file"], "no-file: No such file or directory"),
        (["--prompt", "a", "inference.exit.measure=gate"], "gate"),
        (["--prompt", "a", "--output", "no-folder/out.jsonl"], "no-folder/out.jsonl: No such file or directory"),
        (
            ["--prompt", "a", "--record", "f"],
            "inference.parallel.pipeline: 1, and --record notes what several stages do",
        ),
        (
            ["--prompt", "a", "inference.parallel.layout=survival"],
            "inference.parallel.depths: null, but layout survival",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = _call(capsys, run, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_wrong_prompt_leaves_a_file_as_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": [999]}')
    (tmp_path / "out.jsonl").write_text("earlier texts")
    arguments = ("--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    status, _, err = _call(capsys, run, *arguments)
    assert (status, err) == (2, "prompts.0: 999 is none of the tokenizer's tokens, which are 0 to 257\n")
    assert (tmp_path / "out.jsonl").read_text() == "earlier texts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give prompts, by --prompt or --prompts, or --interactive"),
        (["--prompt", "a", "--interactive"], "give prompts, by --prompt or --prompts, or --interactive"),
        (["--interactive", "--compare"], "--interactive goes with none of --compare, --output and --depths"),
        (["--interactive", "--depths", "f"], "--interactive goes with none of --compare, --output and --depths"),
        (["--prompt", "a", "--compare", "--output", "f"], "--compare prints a table and writes none of --output"),
        (["--prompt", "a", "--compare", "--record", "f"], "--compare prints a table and writes none of --output"),
        (["--prompt", "a", "--compare", "--depths", "f"], "--compare prints a table and writes none of --output"),
        (["--prompt", "a", "--kv-policies"], "--kv-policies goes with --compare"),
    ],
)
def test_flags_that_do_not_go_together(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        _call(capsys, run, *arguments)
    assert message in capsys.readouterr().err


def _captured(run: Path, *arguments: str) -> str:
    with (
        patch.object(sys, "argv", ["inference", "--checkpoint", str(run), *arguments, *SHORT]),
        redirect_stdout(io.StringIO()) as out,
    ):
        assert main() == 0
    return out.getvalue()


def test_of_two_processes_one_prints_what_both_decode(
    run: Path, ranks: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has half of every matrix."""
    command = ("--prompt", "early ", "--prompt", "deeper ", "inference.exit.threshold=0.2")
    first, second = ranks.run(2, _captured, run, *command)
    assert second == ""
    texts, _, table = _call(capsys, run, *command)[1].rpartition("\n\n")
    assert first.startswith(texts)
    assert first.count("tokens by exit layer") == table.count("tokens by exit layer") == 1


def test_the_first_of_two_stages_records_both(run: Path, ranks: RankPool, tmp_path: Path) -> None:
    """By the clock that all follow; the other one is its own."""
    stages = ("inference.parallel.pipeline=2", "inference.exit.threshold=0.2")
    path = tmp_path / "record.json"
    ranks.run(2, _captured, run, "--prompt", "early ", "--prompt", "deeper ", "--record", str(path), *stages)
    record = read_record(path)
    assert len(record.stops) == 2
    first, second = record.lanes("virtual")
    assert first and second
    assert all(of.seconds is not None for of, _ in first)
    assert all(of.seconds is None for of, _ in second)


def test_lines_from_a_pipe_are_continued_one_after_the_other(run: Path) -> None:
    """An error in one of them doesn't end the session."""
    done = subprocess.run(
        _start(run, "--interactive"), input="early \n\ndeeper \n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("[6 tokens, mean depth ") == 3
    assert "tokens                 18 in 3 texts" in done.stdout


def test_a_terminal_sees_depths_in_colour_and_asks_until_the_end(run: Path) -> None:
    out = _on_a_terminal(_start(run, "--interactive", "inference.exit.threshold=0.0"), b"early \n\x04")
    assert "\x1b[38;5;46mexit 2\x1b[0m  \x1b[38;5;196mexit 5\x1b[0m  full depth" in out
    assert out.count("> ") == 2
    assert len(re.findall("\x1b\\[38;5;46m.\x1b\\[0m", out)) == 6


def test_who_wants_no_colour_gets_none(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b" in _call(capsys, run, "--prompt", "early ")[1]
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" not in _call(capsys, run, "--prompt", "early ")[1]


def _on_a_terminal(command: list[str], typed: bytes) -> str:
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "dumb"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, typed)
    shown = b""
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # what Linux says when the other side is closed
        pass
    finally:
        guard.cancel()
        os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    return shown.decode().replace("\r\n", "\n")


def test_a_config_comes_before_overrides() -> None:
    assert split_settings(["run.yaml", "seed=1"]) == (Path("run.yaml"), ["seed=1"])
    assert split_settings(["seed=1"]) == (None, ["seed=1"])
    assert split_settings([]) == (None, [])
