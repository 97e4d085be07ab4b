"""What a run writes down, and what it prints."""

import json
import logging
from pathlib import Path

import pytest

from megatron_ee.training.loggers import Console, JsonLines

TRAINING = {
    "train/loss": 3.5,
    "train/exit_2/loss": 2.5,
    "train/exit_4/loss": 2.25,
    "train/lr": 3e-4,
    "train/grad_norm": 1.5,
    "perf/tokens_per_s": 12345.6,
    "perf/seconds_left": 3725.0,
}


def test_metrics_are_appended_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for iteration in (1, 2):  # a resumed run opens the file again
        logger = JsonLines(path)
        logger.log(iteration, {"train/loss": 0.5})
        assert path.read_text().count("\n") == iteration, "a line is on disk when it is logged"
        logger.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 1, "train/loss": 0.5},
        {"iteration": 2, "train/loss": 0.5},
    ]


def test_console_prints_one_plain_line_with_every_exit(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_ee"), "propagate", True)
    console = Console([2, 4], start=0, train_iters=40)
    with caplog.at_level(logging.INFO, logger="megatron_ee"):
        console.log(10, TRAINING)
        console.log(10, {"val/loss": 3.0, "val/exit_2/loss": 2.0, "val/exit_4/loss": 1.5})
    console.close()
    assert caplog.messages == [
        "10/40  loss 3.5000  exit 2: 2.5000  final: 2.2500  lr 3.00e-04  norm 1.50  12,346 tokens/s  1:02:05 left",
        "validation  loss 3.0000  exit 2: 2.0000  final: 1.5000",
    ]
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err, "no bar where there is no terminal"
