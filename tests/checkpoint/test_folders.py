"""Finding checkpoints: only whole ones exist."""

from pathlib import Path

import pytest

from megatron_ee.checkpoint.description import VERSION, Description, Progress, read_description, write_description
from megatron_ee.checkpoint.folders import (
    CheckpointError,
    find_checkpoint,
    find_model,
    is_huggingface,
    link_latest,
    newest_checkpoint,
    step_folder,
)
from megatron_ee.config import ExitsConfig, ModelConfig

MODEL = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=2)


def _describe(iteration: int) -> Description:
    files = {"a.distcp": "12", "b.distcp": "34"}
    return Description(MODEL, ExitsConfig(layers=(2,)), "fp32", "bytes", 320, Progress(iteration, 4 * iteration), files)


def _write_whole(run: Path, iteration: int) -> Path:
    folder = step_folder(run, iteration)
    folder.mkdir(parents=True)
    write_description(folder, _describe(iteration))
    return folder


def test_a_folder_without_its_format_file_does_not_exist(tmp_path: Path) -> None:
    whole = _write_whole(tmp_path, 10)
    step_folder(tmp_path, 20).mkdir()  # a save that was killed
    assert newest_checkpoint(tmp_path) == whole
    assert find_checkpoint(tmp_path) == whole
    assert find_checkpoint(whole) == whole
    with pytest.raises(CheckpointError, match="nor a step folder"):
        find_checkpoint(step_folder(tmp_path, 20))


def test_a_killed_save_of_a_model_from_hugging_face_is_no_folder_of_theirs(tmp_path: Path) -> None:
    """Its config.json stays with it through training."""
    killed = step_folder(tmp_path, 20)
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{}")
    assert is_huggingface(killed)
    (killed / "common.pt").write_bytes(b"")
    assert not is_huggingface(killed)
    with pytest.raises(CheckpointError, match="nor a step folder"):
        find_model(killed)


def test_newest_is_by_iteration_also_beyond_eight_digits(tmp_path: Path) -> None:
    for iteration in (9, 100, 99_999_999, 100_000_000):
        _write_whole(tmp_path, iteration)
    (tmp_path / "checkpoints/step_backup").mkdir()
    assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 100_000_000)


def test_a_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-run is not a folder"):
        find_checkpoint(tmp_path / "no-such-run")
    assert newest_checkpoint(tmp_path / "no-such-run") is None


def test_latest_points_at_the_last_one_linked(tmp_path: Path) -> None:
    for iteration in (1, 2):
        folder = _write_whole(tmp_path, iteration)
        link_latest(folder)
    latest = tmp_path / "checkpoints/latest"
    assert latest.resolve() == folder
    assert find_checkpoint(latest) == latest


def test_a_description_reads_back(tmp_path: Path) -> None:
    folder = _write_whole(tmp_path, 7)
    assert read_description(folder) == _describe(7)
    assert read_description(folder).hash == _describe(9).hash, "the hash is over the files alone"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ("{}", "damaged"),
        ('{"version": 9}', f"format version 9; this release reads {VERSION}"),
        ("[]", "damaged"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = _write_whole(tmp_path, 7)
    (folder / "format.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_description(folder)
