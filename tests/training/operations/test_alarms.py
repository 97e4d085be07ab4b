"""Alarms: leaps of the loss and slow ranks are named, and nothing else is."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, write_small_dataset
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.training.build import build_trainer
from megatron_ee.training.operations.alarms import SpikeAlarm, slowness


def test_a_leap_is_told_in_deviations_of_late() -> None:
    alarm = SpikeAlarm(deviations=10.0, window=100)
    for step in range(50):
        assert alarm.hear(3.0 + 0.1 * (step % 3 - 1)) == ""  # median 3.0, deviation 1.4826 * 0.1
    assert alarm.hear(4.4) == "", "9.4 deviations"
    assert alarm.hear(5.0) == "the last exit's loss is 5.0000, 13 deviations above 3.0000, its median of late"
    assert alarm.hear(2.0) == "", "a fall is no spike"


def test_a_spike_does_not_hide_the_next_one() -> None:
    alarm = SpikeAlarm(deviations=10.0, window=20)
    for step in range(20):
        alarm.hear(3.0 + 0.1 * (step % 3 - 1))
    assert [alarm.hear(9.0) != "" for _ in range(5)] == [True] * 5


def test_without_enough_before_it_nothing_is_a_spike() -> None:
    alarm = SpikeAlarm(deviations=10.0, window=100)
    assert [alarm.hear(loss) for loss in (1.0, 1.1, 1.2, 50.0)] == [""] * 4
    assert SpikeAlarm(deviations=0.0, window=3).hear(1e9) == ""


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_remembered(loss: float) -> None:
    alarm = SpikeAlarm(deviations=10.0, window=10)
    for step in range(10):
        alarm.hear(3.0 + 0.1 * (step % 3 - 1))
        assert alarm.hear(loss) == ""
    assert alarm.hear(9.0) != ""


LOSSES = st.lists(st.integers(0, 1000), min_size=20, max_size=60)


@given(LOSSES, st.sampled_from([0.25, 2.0, 64.0]), st.integers(-500, 500))
def test_the_unit_of_the_loss_does_not_matter(losses: list[int], scale: float, shift: int) -> None:
    one, other = SpikeAlarm(deviations=3.0, window=15), SpikeAlarm(deviations=3.0, window=15)
    for loss in losses:
        moved = (loss + shift) * scale  # exact in binary
        assert (one.hear(float(loss)) == "") == (other.hear(moved) == "")


def test_a_rank_is_compared_with_those_of_its_stage() -> None:
    assert slowness([1.0, 1.0, 2.0, 4.0], num_stages=2) == [1.0, 1.0, 0.5, 2.0]
    assert slowness([1.0, 5.0], num_stages=2) == [1.0, 1.0], "stages have different work"
    assert slowness([0.0, 0.0], num_stages=1) == [1.0, 1.0], "a runtime that shows no actions"
    assert slowness([1.0, 1.0, 3.0, 1.0], num_stages=1) == [1.0, 1.0, 3.0, 1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alarms")
    write_small_dataset(folder)
    return folder


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _train(config: Config, disturb: str) -> list[str]:
    """What a rank warns of while the last one is disturbed from iteration 16 on."""
    trainer, warnings = build_trainer(config, choose_device("cpu")), _Warnings()
    trainer.loggers = []
    logging.getLogger("megatron_ee").addHandler(warnings)
    layer = next(module for name, module in trainer.stage.named_modules() if name.endswith("mlp"))

    def disturbed(module: Any, inputs: Any, output: Any) -> Any:
        if trainer.progress.iteration < 15 or trainer.mesh.rank != trainer.mesh.world_size - 1:
            return output
        if disturb == "time":
            time.sleep(0.25)  # a loaded machine is slow too
            return output
        return (output[0] * 1000.0, *output[1:])

    layer.register_forward_hook(disturbed)
    trainer.train()
    logging.getLogger("megatron_ee").removeHandler(warnings)
    return warnings.said


def test_a_leap_of_the_loss_is_said_once_with_its_step(folder: Path, ranks: RankPool) -> None:
    faults = {"spike_deviations": 5.0, "spike_window": 4}  # a loss that falls has wide deviations over many steps
    config = run_config(folder, name="leap", parallel={"pipeline": 2}, training={"train_iters": 18}, faults=faults)
    main, other = ranks.run(2, _train, config, "loss")
    assert other == []
    assert main[0].startswith("iteration 16: the last exit's loss is ")
    assert "deviations above" in main[0]


@pytest.mark.slow
def test_a_slow_rank_is_named_once(folder: Path, ranks: RankPool) -> None:
    config = run_config(
        folder,
        name="slow",
        parallel={"data": 2},
        training={"train_iters": 28},
        logging={"interval": 4},
        faults={"straggler_ratio": 2.0, "spike_deviations": 0},
    )
    main, other = ranks.run(2, _train, config, "time")
    assert other == []
    (warning,) = [said for said in main if "as long at its work" in said]
    at = re.match(r"iteration (\d+): rank 1 on ", warning)
    assert at and int(at[1]) in (16, 20, 24), warning  # later where the machine itself holds rank 0 up
