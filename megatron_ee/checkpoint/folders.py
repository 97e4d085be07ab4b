"""Where checkpoints are: RUN/checkpoints/step_00001000/, and `latest`, a link to the newest whole one.

A Hugging Face folder stands for one wherever a model is read and no optimizer's state is needed.
"""

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ee.errors import UserError

FORMAT_FILE = "format.json"
SHARD_SUFFIX = ".distcp"
PLAIN_VALUES_FILE = "common.pt"
"""What a save writes first, beside the shards; the name is megatron-core's."""
HUGGING_FACE_FILE = "config.json"


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: files are missing, incomplete or changed."""


def step_folder(run: Path, iteration: int) -> Path:
    return run / "checkpoints" / f"step_{iteration:08d}"


def is_whole(folder: Path) -> bool:
    """Whether saving ended: the format file is written last."""
    return (folder / FORMAT_FILE).is_file()


def newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of the highest iteration, or None."""
    steps = whole_checkpoints(run)
    return steps[max(steps)] if steps else None


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """A run's whole checkpoints by iteration."""
    return {
        int(folder.name.removeprefix("step_")): folder
        for folder in (run / "checkpoints").glob("step_*")
        if folder.name.removeprefix("step_").isdecimal() and is_whole(folder)
    }


def is_huggingface(path: Path) -> bool:
    """Whether a folder is a model's in Hugging Face's format; a run's or a step folder is what it is, whole or not."""
    if is_whole(path) or (path / PLAIN_VALUES_FILE).exists() or newest_checkpoint(path) is not None:
        return False
    return (path / HUGGING_FACE_FILE).is_file()


def find_model(path: Path) -> Path:
    """A Hugging Face folder as it is, and anything else as `find_checkpoint` takes it."""
    return path if is_huggingface(path) else find_checkpoint(path)


def find_checkpoint(path: Path) -> Path:
    """A step folder from what a user gave: the folder itself, or a run's (its newest).

    Raises:
        CheckpointError: neither.
    """
    if is_whole(path):
        return path
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: {path} is not a folder")
    if (newest := newest_checkpoint(path)) is not None:
        return newest
    raise CheckpointError(
        f"checkpoint: {path} is neither a run with a whole checkpoint nor a step folder (no {FORMAT_FILE}) nor a "
        f"Hugging Face folder (no {HUGGING_FACE_FILE})"
    )


def link_latest(folder: Path) -> None:
    """Point `latest` at a step folder, in one step. Only one process of a run does it. People go by it, and no program
    does: where it cannot be made, that is a warning."""
    aside = folder.parent / ".latest"
    try:
        aside.unlink(missing_ok=True)  # a killed one's
        aside.symlink_to(folder.name)
        aside.replace(folder.parent / "latest")
    except OSError as error:
        logging.getLogger("megatron_ee").warning("`latest` cannot be made to point at %s: %s", folder, error)


def set_aside(folder: Path) -> str:
    """Rename a damaged step folder, so that it is no checkpoint any more; returns the new name.

    Raises:
        OSError: it stays.
    """
    name = first = f"damaged_{folder.name}"
    for number in itertools.count(2):
        if not folder.with_name(name).exists():
            break
        name = f"{first}.{number}"
    folder.rename(folder.with_name(name))
    return name


def sync_folder(folder: Path) -> None:
    """See that the names of its files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(destination: Path) -> Iterator[Path]:
    """A new folder, beside the destination and under another name, that becomes the destination at the end; of one that
    is not completed, for whatever reason, nothing stays.

    Raises:
        UserError: the destination exists, or cannot be written.
    """
    if destination.exists():
        raise UserError(f"{destination} exists; give a folder that does not")
    aside = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        aside.rename(destination)
        sync_folder(destination.parent)
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # it is not there any more where all went well
