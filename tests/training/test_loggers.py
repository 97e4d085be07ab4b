"""What a run writes down, and what it prints."""

import importlib.util
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from helpers.disks import small_disk

from megatron_ee.config import LoggingConfig
from megatron_ee.errors import UserError
from megatron_ee.training.loggers import Console, JsonLines, TensorBoard, check_loggers

TRAINING = {
    "train/loss": 3.5,
    "train/exit_2/loss": 2.5,
    "train/exit_4/loss": 2.25,
    "train/lr": 3e-4,
    "train/grad_norm": 1.5,
    "perf/tokens_per_s": 12345.6,
    "perf/seconds_left": 3725.0,
}


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_appended_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for start in (0, 1):  # a resumed run opens the file again
        logger = JsonLines(path, start=start)
        logger.log(start + 1, {"train/loss": 0.5})
        assert path.read_text().count("\n") == start + 1, "a line is on disk when it is logged"
        logger.close()
    assert _lines(path) == [{"iteration": 1, "train/loss": 0.5}, {"iteration": 2, "train/loss": 0.5}]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ["", '{"iteration": 4, "train/lo', '{"iteration": 2}', "\0\0\0"])
def test_a_resumed_record_holds_nothing_beyond_the_checkpoint(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"iteration": 1}\n{"iteration": 2}\n{"iteration": 2, "val/loss": 1.0}\n'
    path.write_text(whole + '{"iteration": 3}\n' + torn)
    JsonLines(path, start=2).close()
    assert path.read_text() == whole
    lost = path.with_name("metrics.jsonl.lost")
    assert lost.read_text().splitlines() == ['{"iteration": 3}', *([torn] if torn else [])]
    path.write_text(whole + '{"iteration": 3}\n')
    JsonLines(path, start=0).close()  # no checkpoint: the run begins anew
    assert path.read_text() == ""
    assert lost.read_text().endswith(whole + '{"iteration": 3}\n'), "every lost part is kept"


def test_a_record_that_goes_on_where_it_ended_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 2}\n')
    before = path.stat()
    JsonLines(path, start=2).close()
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_full_disk_loses_no_line_and_tears_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    with small_disk(tmp_path, megabytes=1) as disk:
        path = disk.path / "run" / "metrics.jsonl"
        logger = JsonLines(path, start=0)
        disk.fill()
        for iteration in range(1, 10):  # the disk gives room by pages: some line is torn
            logger.log(iteration, {"train/loss": iteration, "padding": "x" * 1000})
        assert caplog.text.count("cannot be written: No space left on device") == 1, "said once"
        assert path.read_bytes().count(b"\n") < 9 and not path.read_bytes().endswith(b"\n"), "a line is torn, for now"
        disk.free()
        logger.log(10, {"train/loss": 10})
        assert [line["train/loss"] for line in _lines(path)] == list(range(1, 11))
        disk.fill()
        logger.log(11, {"padding": "x" * 10000})
        logger.close()
    assert "the last 1 lines are lost" in caplog.text


def test_a_read_only_disk_loses_no_line(tmp_path: Path) -> None:
    with small_disk(tmp_path, megabytes=1) as disk:
        path = disk.path / "metrics.jsonl"
        logger = JsonLines(path, start=0)
        for iteration, allowed in enumerate([True, False, False, True], 1):
            disk.allow_writing(allowed=allowed)
            logger.log(iteration, {})
        assert [line["iteration"] for line in _lines(path)] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's own thread
def test_tensorboard_gives_up_on_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    with small_disk(tmp_path, megabytes=1) as disk:
        logger = TensorBoard(disk.path / "tensorboard", start=0)
        disk.fill()
        for iteration in range(1, 400):
            logger.log(iteration, TRAINING)
        logger.close()
    assert caplog.text.count("tensorboard: going on without") == 1


def test_console_prints_one_plain_line_with_every_exit(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    console = Console([2, 4], final_exit=4, start=0, train_iters=40)
    with caplog.at_level(logging.INFO, logger="megatron_ee"):
        console.log(10, TRAINING)
        console.log(10, {"val/loss": 3.0, "val/exit_2/loss": 2.0, "val/exit_4/loss": 1.5})
        console.log(20, {**TRAINING, "perf/mfu": 0.4123})
        skipped = {name: value for name, value in TRAINING.items() if "loss" not in name and "norm" not in name}
        console.log(30, skipped)
        console.log(30, {name: value for name, value in TRAINING.items() if "exit_2" not in name})
    console.close()
    assert caplog.messages == [
        "10/40  loss 3.5000  exit 2: 2.5000  final: 2.2500  lr 3.00e-04  norm 1.50  12,346 tokens/s  1:02:05 left",
        "validation  loss 3.0000  exit 2: 2.0000  final: 1.5000",
        "20/40  loss 3.5000  exit 2: 2.5000  final: 2.2500  lr 3.00e-04  norm 1.50  12,346 tokens/s  41.2% MFU  "
        "1:02:05 left",
        "30/40  no loss, all steps were skipped  lr 3.00e-04  step skipped  12,346 tokens/s  1:02:05 left",
        "30/40  loss 3.5000  final: 2.2500  lr 3.00e-04  norm 1.50  12,346 tokens/s  1:02:05 left",
    ]
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err, "no bar where there is no terminal"


def test_console_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console([2, 4], final_exit=4, start=5, train_iters=40)
    assert " 5/40 " in terminal.getvalue()
    console.log(10, TRAINING)
    assert "\r" in terminal.getvalue() and " 10/40 " in terminal.getvalue()
    console.close()
    assert terminal.getvalue().rsplit("\r", 1)[-1].strip() == "", "the bar is gone at the end"


def test_asking_for_tensorboard_without_its_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers(LoggingConfig(tensorboard=False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^logging.tensorboard: .* pip install 'megatron-ee\[tensorboard\]'$"):
        check_loggers(LoggingConfig(tensorboard=True))
    check_loggers(LoggingConfig(tensorboard=False))
