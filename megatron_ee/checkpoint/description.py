"""format.json: what a checkpoint holds. It is written last; without it the checkpoint does not exist."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_ee.checkpoint.folders import (
    FORMAT_FILE,
    PLAIN_VALUES_FILE,
    SHARD_SUFFIX,
    CheckpointError,
    DamagedError,
    sync_folder,
)
from megatron_ee.checkpoint.places import PLACES_FILE
from megatron_ee.config import ExitsConfig, ModelConfig, Precision

VERSION = 6

Trains = Literal["all", "exits"]

_OF_STATE = (PLAIN_VALUES_FILE, PLACES_FILE, "config.yaml", ".metadata", "metadata.json")
"""Files of a step folder that every save writes anew, beside those of shards."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the run was: steps done, and samples drawn from the training data."""

    iteration: int
    consumed_samples: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint whose parameters a run began with.

    Attributes:
        path: of the step folder, or the Hugging Face folder, as the run found it.
        hash: its description's; of a Hugging Face folder's `fingerprint`.
    """

    path: str
    hash: str


@dataclass(frozen=True, slots=True)
class Description:
    """The model in a checkpoint.

    Attributes:
        precision: of the parameters: fp32, bf16 or fp16.
        tokenizer: its name, which says what it is and not where; its files, if it has any, lie beside format.json.
        files: checksum of every other file of the folder; what other files are bound to is the SHA-256 over these.
        trains: what the run trains, and the checkpoint holds: all of the model, or its early exits alone.
        has_optimizer: whether it holds what a run goes on from, beside the parameters.
        initial: what the run began with; None: random parameters.
    """

    model: ModelConfig
    exits: ExitsConfig
    precision: Precision
    tokenizer: str
    vocab_size: int
    progress: Progress
    files: Mapping[str, str] = field(default_factory=dict)
    trains: Trains = "all"
    has_optimizer: bool = True
    initial: Origin | None = None

    @property
    def hash(self) -> str:
        return hash_of(self.files)


def hash_of(files: Mapping[str, str]) -> str:
    """SHA-256 over the names and SHA-256s of a folder's files."""
    listing = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def write_description(folder: Path, description: Description) -> None:
    """Write format.json so that it is whole or absent, also after a power failure."""
    content = {
        "version": VERSION,
        "model": description.model.model_dump(mode="json"),
        "exits": description.exits.model_dump(mode="json"),
        "precision": description.precision,
        "tokenizer": description.tokenizer,
        "vocab_size": description.vocab_size,
        "iteration": description.progress.iteration,
        "consumed_samples": description.progress.consumed_samples,
        "trains": description.trains,
        "has_optimizer": description.has_optimizer,
        "initial": asdict(description.initial) if description.initial else None,
        "hash": description.hash,
        "files": dict(description.files),
    }
    aside = folder / f".{FORMAT_FILE}"
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)  # before there is a checkpoint, its files' names are on the disk
    aside.replace(folder / FORMAT_FILE)
    sync_folder(folder)


def read_description(folder: Path) -> Description:
    """
    Raises:
        CheckpointError: the file is of another format version, or cannot be read.
        DamagedError: it is not what was saved.
    """
    path = folder / FORMAT_FILE
    try:
        content: Any = json.loads(path.read_bytes())
        if type(version := content["version"]) is int and version != VERSION:
            raise CheckpointError(
                f"{path}: format version {version}; this release reads {VERSION}. Take the release that wrote it, or "
                f"another run name to begin anew"
            )
        description = _parse(content)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    if description.hash != content["hash"] or any(Path(name).name != name for name in description.files):
        raise DamagedError(f"{path} is damaged (its list of files is not what was saved)")
    return description


def is_beside_state(name: str) -> bool:
    """Whether a file of a step folder is the tokenizer's, or came with the model: it is handed on as it is."""
    return name not in _OF_STATE and not name.endswith(SHARD_SUFFIX)


def _parse(content: Mapping[str, Any]) -> Description:
    """
    Raises:
        ValueError, KeyError, TypeError, AttributeError: something is missing, or no such thing.
    """
    files: Mapping[str, str] = {str(name): str(digest) for name, digest in content["files"].items()}
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r}")
    return Description(
        model=ModelConfig.model_validate(content["model"]),
        exits=ExitsConfig.model_validate(content["exits"]),
        precision=_one_of(get_args(Precision), content["precision"]),
        tokenizer=content["tokenizer"],
        vocab_size=content["vocab_size"],
        progress=Progress(content["iteration"], content["consumed_samples"]),
        trains=_one_of(get_args(Trains), content["trains"]),
        has_optimizer=_one_of((True, False), content["has_optimizer"]),
        initial=Origin(**initial) if (initial := content["initial"]) else None,
        files=files,
    )


def _one_of(choices: Sequence[Any], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {choices}")
    return value
