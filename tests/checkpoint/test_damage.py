"""Damaged checkpoints: a run goes back to the last good one, and says so; decoding refuses; nothing unpickles code."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.checkpoint.description import VERSION
from megatron_ee.checkpoint.folders import newest_checkpoint, step_folder
from megatron_ee.checkpoint.unpickling import check_pickles
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import load_model
from megatron_ee.training.build import build_trainer

SAVED = (2, 4)
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """With a run of two stages that has the checkpoints of SAVED."""
    folder = tmp_path_factory.mktemp("damage")
    write_small_dataset(folder)
    ranks.run(2, train, _config(folder, "whole"), SAVED[-1])
    return folder


def _config(folder: Path, name: str, **changes: Any) -> Config:
    changes = {"parallel": {"pipeline": 2}, "checkpoint": {"interval": SAVED[0]}, **changes}
    return run_config(folder, name=name, **changes)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _truncate(path: Path, part: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def _replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def _set_version(path: Path, version: int) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "flipped bit": (lambda step: _flip(step / "__1_0.distcp", -1000), "__1_0.distcp is not what was saved"),
    "truncated shard": (lambda step: _truncate(step / "__0_1.distcp"), "__0_1.distcp is not what was saved"),
    "missing shard": (lambda step: (step / "__1_1.distcp").unlink(), "__1_1.distcp is missing"),
    "truncated metadata": (lambda step: _truncate(step / ".metadata"), ".metadata is not what was saved"),
    "truncated plain values": (lambda step: _truncate(step / "common.pt"), "common.pt is not what was saved"),
    "empty backends": (lambda step: _truncate(step / "metadata.json", 0), "metadata.json is not what was saved"),
    "truncated description": (lambda step: _truncate(step / "format.json"), "format.json is damaged"),
    "empty description": (lambda step: _truncate(step / "format.json", 0), "format.json is damaged"),
    "changed digests": (
        lambda step: (step / "format.json").write_text(
            (step / "format.json").read_text().replace('"common.pt"', '"c"')
        ),
        "format.json is damaged (its list of files is not what was saved)",
    ),
}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _resume(*configs: Config) -> list[tuple[int, str, list[str]]]:
    """Of each run: the iteration that it goes on from, or -1, why not, and what it warned of."""
    answers = []
    for config in configs:
        heard = _Heard()
        logging.getLogger("megatron_ee").addHandler(heard)
        try:
            answers.append((build_trainer(config, choose_device("cpu")).progress.iteration, "", heard.said))
        except UserError as error:
            answers.append((-1, str(error), heard.said))
        finally:
            logging.getLogger("megatron_ee").removeHandler(heard)
            _leave_groups()
    return answers


def _leave_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def _copy(folder: Path, name: str) -> Path:
    run = folder / "runs" / name
    shutil.copytree(folder / "runs/whole/checkpoints", run / "checkpoints", symlinks=True)
    return run


def test_a_run_goes_back_to_the_last_good_checkpoint(folder: Path, ranks: RankPool) -> None:
    runs = {name: _copy(folder, name.replace(" ", "-")) for name in DAMAGE}
    for name, run in runs.items():
        DAMAGE[name][0](step_folder(run, SAVED[1]))
    results = ranks.run(2, _resume, *(_config(folder, run.name) for run in runs.values()))
    for (name, run), of_main, of_other in zip(runs.items(), *results, strict=True):
        iteration, problem, said = of_main
        assert (iteration, problem) == (SAVED[0], ""), name
        assert of_other == (SAVED[0], "", []), "one rank says it"
        (warning,) = said
        assert DAMAGE[name][1] in warning
        assert "renamed to damaged_step_00000004" in warning
        assert {path.name for path in (run / "checkpoints").iterdir()} == {
            "step_00000002",
            "damaged_step_00000004",
            "latest",
        }
        assert (run / "checkpoints/latest").resolve() == step_folder(run, SAVED[0])


@pytest.mark.slow
def test_a_run_that_went_back_ends_as_if_nothing_had_been(folder: Path, ranks: RankPool) -> None:
    run = _copy(folder, "repaired")
    DAMAGE["flipped bit"][0](step_folder(run, SAVED[1]))
    repaired = ranks.run(2, train, _config(folder, "repaired"))
    undisturbed = ranks.run(2, train, _config(folder, "undisturbed"))
    for ours, theirs in zip(repaired, undisturbed, strict=True):
        assert ours["started_at"] == SAVED[0]
        for name, parameter in theirs["parameters"].items():
            assert (ours["parameters"][name] == parameter).all(), name
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *("step_00000002", "step_00000004", "step_00000006", "damaged_step_00000004", "latest")
    }


def test_without_a_good_checkpoint_a_run_is_refused_and_does_not_begin_anew(folder: Path, ranks: RankPool) -> None:
    run = _copy(folder, "hopeless")
    for iteration in SAVED:
        DAMAGE["missing shard"][0](step_folder(run, iteration))
    config = _config(folder, "hopeless")
    first, second = ranks.run(1, _resume, *[config.model_copy(update={"parallel": type(config.parallel)()})] * 2)[0]
    assert first[0] == second[0] == -1
    assert "holds damaged checkpoints and no good one" in first[1]
    assert len(first[2]) == 2 and second[1:] == (first[1], []), "it is said at every start"


def test_a_checkpoint_of_another_format_is_refused_and_stays(folder: Path, ranks: RankPool) -> None:
    run = _copy(folder, "older")
    newest = step_folder(run, SAVED[1])
    _set_version(newest / "format.json", 3)
    for (answer,) in ranks.run(2, _resume, _config(folder, "older")):
        assert answer[0] == -1
        assert f"{newest}/format.json: format version 3; this release reads {VERSION}" in answer[1]
    assert newest_checkpoint(run) == newest


def test_verification_can_be_left_out(folder: Path, ranks: RankPool) -> None:
    """Then files are taken as they are: a changed byte goes unnoticed, a torn file is refused."""
    changed, torn = _copy(folder, "unverified"), _copy(folder, "torn")
    (step_folder(changed, SAVED[1]) / "config.yaml").write_text("name: other\n")
    _truncate(step_folder(torn, SAVED[1]) / "__0_0.distcp", 0.1)
    configs = [_config(folder, run.name, checkpoint={"interval": SAVED[0], "verify": False}) for run in (changed, torn)]
    for unnoticed, refused in ranks.run(2, _resume, *configs):
        assert unnoticed[:2] == (SAVED[1], "")
        assert refused[0] == -1
        assert f"{step_folder(torn, SAVED[1])} cannot be loaded" in refused[1]


def _load_to_decode(step: Path, config: Config) -> str:
    try:
        load_model(step, config, choose_device("cpu"))
    except UserError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("name", ["flipped bit", "truncated description", "missing shard"])
def test_decoding_names_the_damage_and_renames_nothing(folder: Path, ranks: RankPool, name: str) -> None:
    run = _copy(folder, f"decoded-{name.replace(' ', '-')}")
    newest = step_folder(run, SAVED[1])
    DAMAGE[name][0](newest)
    (message,) = ranks.run(1, _load_to_decode, newest, _config(folder, run.name))
    assert str(newest) in message and DAMAGE[name][1] in message
    assert newest_checkpoint(run) == newest


class _Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, ("touch was-run",)


def test_metadata_that_would_run_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    step = shutil.copytree(step_folder(folder / "runs/whole", SAVED[0]), tmp_path / "step")
    check_pickles(step)
    (step / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(UserError, match=r"asks for posix\.system, which could run any code"):
        check_pickles(step)
    assert not (tmp_path / "was-run").exists()


def test_metadata_that_points_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    step = shutil.copytree(step_folder(folder / "runs/whole", SAVED[0]), tmp_path / "step")
    content = (step / ".metadata").read_bytes()
    metadata = pickle.loads(content)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="points out of the folder"):
        check_pickles(step)


@pytest.mark.parametrize("content", [torch.arange(3), _Code()], ids=["tensor", "code"])
def test_objects_among_shards_run_no_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    monkeypatch.chdir(tmp_path)
    step = shutil.copytree(step_folder(folder / "runs/whole", SAVED[0]), tmp_path / "step")
    metadata = pickle.loads((step / ".metadata").read_bytes())
    torch.save([content], step / "__9_0.distcp")
    metadata.state_dict_metadata["object"] = BytesStorageMetadata()
    length = (step / "__9_0.distcp").stat().st_size
    metadata.storage_data[MetadataIndex("object")] = _StorageInfo("__9_0.distcp", 0, length)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    if isinstance(content, _Code):
        with pytest.raises(UserError, match="could run any code"):
            check_pickles(step)
    else:
        check_pickles(step)
    assert not (tmp_path / "was-run").exists()
