"""A save holds the moment at which it was started; one that fails fails on all ranks, and leaves nothing."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.disks import SmallDisk, small_disk
from helpers.ranks import RankPool
from helpers.runs import Records, run_config, write_small_dataset

from megatron_ee.checkpoint import writing
from megatron_ee.checkpoint.folders import newest_checkpoint, step_folder, whole_checkpoints
from megatron_ee.checkpoint.saver import SaveError
from megatron_ee.checkpoint.staging import Staging
from megatron_ee.config import Config
from megatron_ee.device import Device, choose_device
from megatron_ee.training.build import build_trainer
from megatron_ee.training.operations.skipping import DivergedError
from megatron_ee.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    write_small_dataset(folder)
    return folder


def _build(config: Config) -> Trainer:
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.loggers = [Records()] if trainer.mesh.is_main else []
    return trainer


def test_staged_tensors_are_copies_of_their_own(cpu: Device) -> None:
    staging = Staging(cpu)
    originals = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor(4), torch.empty(0, 3), torch.ones(8, 9).T]
    views = [torch.arange(100.0)[10:20], *originals]
    copies = staging.copy(views)
    expected = [view.clone() for view in views]
    for view in views:
        view.zero_()
    for copy, value in zip(copies, expected, strict=True):
        assert torch.equal(copy, value) and copy.dtype == value.dtype and copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == copy.nbytes, "torch.save writes storages"
    memory = copies[0].data_ptr()
    assert staging.copy(views)[0].data_ptr() == memory, "it is used again"


def _save_while_training(config: Config) -> None:
    """One run saves at its iteration 1 while iteration 2 goes on; the writers wait for the end of that."""
    go_on = threading.Event()
    write_item = writing._write_item

    def wait_and_write(*args: Any) -> Any:
        assert go_on.wait(60)
        return write_item(*args)

    trainer = _build(config)
    vars(writing)["_write_item"] = wait_and_write
    try:
        trainer.train(until=1)
        trainer.start_saving()
        before = [parameter.detach().clone() for parameter in trainer.stage.parameters()]
        trainer.train_step(trainer.loader.batch(trainer.progress.consumed_samples), 1)
        after = list(trainer.stage.parameters())
        assert not any(map(torch.equal, before, after)), "the step changed all"
        assert trainer.saving.is_writing()
        assert not list(step_folder(trainer.run_folder, 1).glob("*.json"))
        go_on.set()
        trainer.saving.settle()
    finally:
        vars(writing)["_write_item"] = write_item
        go_on.set()


def _save_at_rest(config: Config) -> None:
    trainer = _build(config)
    trainer.train(until=1)
    trainer.save()


def test_a_save_holds_what_there_was_when_it_began(folder: Path, ranks: RankPool) -> None:
    configs = [run_config(folder, name=name, parallel={"pipeline": 2}) for name in ("during", "at-rest")]
    ranks.run(2, _save_while_training, configs[0])
    ranks.run(2, _save_at_rest, configs[1])
    during, at_rest = (step_folder(folder / "runs" / config.name, 1) for config in configs)
    names = {path.name for path in at_rest.iterdir()}
    assert names == {path.name for path in during.iterdir()}
    for name in names - {"config.yaml", "format.json"}:  # these have the run's name in them
        assert (during / name).read_bytes() == (at_rest / name).read_bytes(), name


def _fail_on_rank_one(config: Config) -> tuple[str, bool]:
    """What saving raises, and whether training can save again."""
    trainer, raised = _build(config), ""
    trainer.train(until=1)
    write_item = writing._write_item

    def fail(*args: Any) -> Any:
        raise OSError(5, "Input/output error")

    if trainer.mesh.rank == 1:
        vars(writing)["_write_item"] = fail
    try:
        trainer.save()
    except SaveError as error:
        raised = str(error)
    vars(writing)["_write_item"] = write_item
    is_gone = not step_folder(trainer.run_folder, 1).exists()
    trainer.mesh.barrier()
    return raised, is_gone and trainer.save().exists()


def test_a_rank_that_fails_fails_the_save_on_all(folder: Path, ranks: RankPool) -> None:
    config = run_config(folder, name="one-fails", parallel={"pipeline": 2})
    for raised, saves_again in ranks.run(2, _fail_on_rank_one, config):
        assert raised.endswith("step_00000001 cannot be written: rank 1: [Errno 5] Input/output error")
        assert saves_again


def _diverge_while_saving(config: Config) -> bool:
    """Whether the save was under way when the run diverged."""
    trainer, write_item = _build(config), writing._write_item
    has_diverged = threading.Event()

    def write_at_last(*args: Any) -> Any:
        assert has_diverged.wait(60)
        return write_item(*args)

    def diverge(*args: Any) -> float:
        has_diverged.set()
        return float("nan")  # as a plug-in's optimizer might

    trainer.train(until=1)
    vars(writing)["_write_item"] = write_at_last
    trainer.start_saving()
    was_pending = trainer.saving.is_pending
    trainer.optimizer.step = diverge  # type: ignore[method-assign]
    try:
        with pytest.raises(DivergedError):
            trainer.train()
    finally:
        vars(writing)["_write_item"] = write_item
    return was_pending


def test_a_run_that_diverges_keeps_the_save_under_way(folder: Path, ranks: RankPool) -> None:
    config = run_config(folder, name="diverged", parallel={"pipeline": 2}, faults={"max_nonfinite": 1})
    assert ranks.run(2, _diverge_while_saving, config) == [True, True]
    run = folder / "runs/diverged"
    assert newest_checkpoint(run) == step_folder(run, 1)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _begin(disk: SmallDisk, trouble: str) -> None:
    disk.fill() if trouble == "full" else disk.allow_writing(allowed=False)


def _end(disk: SmallDisk, trouble: str) -> None:
    disk.free() if trouble == "full" else disk.allow_writing(allowed=True)


def _train_in_trouble(config: Config, disk: SmallDisk, trouble: str, until: int) -> tuple[str, list[str], Any]:
    """A run whose disk is in trouble after iteration 2, and from `until` on no more.

    Returns:
        What training raised, what it warned of, and the figures that were logged.
    """
    heard, raised = _Heard(), ""
    trainer = _build(config)
    main = trainer.mesh.is_main
    logging.getLogger("megatron_ee").addHandler(heard)
    trainer.train(until=2)
    trainer.lock.release()  # a disk with an open file refuses to become read-only, if it is asked
    trainer.mesh.from_main(lambda: _begin(disk, trouble))
    try:
        trainer.train(until)
        trainer.mesh.from_main(lambda: _end(disk, trouble))
        trainer.train()
    except SaveError as error:
        raised = str(error)
        trainer.mesh.from_main(lambda: _end(disk, trouble))
    logging.getLogger("megatron_ee").removeHandler(heard)
    return raised, heard.said, trainer.loggers[0].figures if main else {}  # type: ignore[attr-defined]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, megabytes=32) as disk:
        yield disk


def _config(folder: Path, runs: Path, **checkpoint: Any) -> Config:
    return run_config(
        folder, name="trouble", runs=str(runs), parallel={"pipeline": 2}, checkpoint={"interval": 1, **checkpoint}
    )


def _losses(figures: dict[int, dict[str, float]]) -> list[float]:
    return [of["train/loss"] for _, of in sorted(figures.items())]


def _train(config: Config) -> Any:
    trainer = _build(config)
    trainer.train()
    return trainer.loggers[0].figures if trainer.mesh.is_main else {}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, ranks: RankPool) -> list[float]:
    return _losses(ranks.run(2, _train, _config(folder, folder / "undisturbed"))[0])


@pytest.mark.parametrize(
    ("trouble", "message", "asynchronous"),
    [
        ("full", "No space left on device", True),
        ("read-only", "Read-only file system", False),
        pytest.param("full", "No space left on device", False, marks=pytest.mark.slow),
        pytest.param("read-only", "Read-only file system", True, marks=pytest.mark.slow),
    ],
    ids=["full, asynchronous", "read-only, synchronous", "full, synchronous", "read-only, asynchronous"],
)
def test_training_goes_on_without_a_disk_and_saves_again_with_one(
    folder: Path,
    ranks: RankPool,
    disk: SmallDisk,
    undisturbed: list[float],
    trouble: str,
    message: str,
    asynchronous: bool,
) -> None:
    config = _config(folder, disk.path, asynchronous=asynchronous)
    (raised, said, figures), of_other = ranks.run(2, _train_in_trouble, config, disk, trouble, 4)
    assert raised == "" and of_other == ("", [], {}), "one rank says it"
    assert len(said) == 2, said
    for iteration, line in zip((3, 4), said, strict=True):
        assert f"step_{iteration:08d} cannot be" in line and message in line and "training goes on" in line
    run = disk.path / "trouble"
    assert sorted(whole_checkpoints(run)) == [1, 2, 5, 6]
    assert len(list((run / "checkpoints").iterdir())) == 5, "with `latest`, and no half a checkpoint"
    assert _losses(figures) == undisturbed


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_run_that_cannot_save_its_end_fails(folder: Path, ranks: RankPool, disk: SmallDisk, trouble: str) -> None:
    config = _config(folder, disk.path)
    for raised, _, _ in ranks.run(2, _train_in_trouble, config, disk, trouble, 6):
        assert "step_00000006 cannot be" in raised, "on all ranks, or some would wait for others"
    assert newest_checkpoint(disk.path / "trouble") == step_folder(disk.path / "trouble", 2)
