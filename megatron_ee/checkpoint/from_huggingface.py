"""Makes a run folder of a model's folder of Hugging Face's, tensor by tensor: the whole model is never in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.folders import step_folder, written_aside
from megatron_ee.checkpoint.streaming import Streamed, write_streamed
from megatron_ee.config import Config, to_yaml
from megatron_ee.errors import UserError
from megatron_ee.huggingface.folder import Folder, open_folder
from megatron_ee.huggingface.settings import CONFIG_FILE
from megatron_ee.tokenizer import Tokenizer, open_tokenizer
from megatron_ee.tokenizer.huggingface import CHAT_TEMPLATE_FILE

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_OF_MODEL = (CONFIG_FILE, "generation_config.json")
"""Files that are kept as they are, so that `export_model` gives back what our model doesn't have."""

_SEQUENCE_LENGTH = 1024  # of a run that says nothing else


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it: the step folder, and what it was made of."""

    folder: Path
    source: Folder
    tokenizer: str


def import_model(source: Path, destination: Path, *, tokenizer: str | None = None) -> Imported:
    """Write a run folder with one checkpoint, of iteration 0 and without optimizer state, that any run can begin with.

    The folder appears when it is complete.

    Args:
        source: with config.json, safetensors, and a tokenizer's files; with exits.json, its exits come too.
        destination: of a name that a run may have, and not there yet.
        tokenizer: `bytes`, a tokenizer.json or a tokenizer's folder; None: the source's own.

    Raises:
        UserError: the source is not whole or not of a known kind; it has no tokenizer; the destination exists or cannot
            be written.
    """
    folder = open_folder(source)
    opened = _open_tokenizer(folder, tokenizer)
    vocab_size = folder.described.vocab_size
    if opened.vocab_size > vocab_size:
        raise UserError(f"{source}: its embedding has {vocab_size} rows, and its tokenizer {opened.vocab_size} tokens")
    config = _config(folder, destination, opened)
    description = Description(
        model=folder.described.model,
        exits=config.exits,
        precision=folder.precision,
        tokenizer=opened.name,
        vocab_size=vocab_size,
        progress=Progress(0, 0),
        has_optimizer=False,
    )
    files = read_files(source, (*_OF_MODEL, *_TOKENIZER_FILES) if tokenizer is None else _OF_MODEL)
    files |= opened.files()  # a tokenizer.json that had to be made goes with the settings that were made with it
    text = to_yaml(config).encode()
    parameters = [
        Streamed(name, recipe.shape, partial(folder.read_parameter, name)) for name, recipe in folder.recipes.items()
    ]
    with written_aside(destination) as aside:
        step = write_streamed(aside, parameters, description, {"config.yaml": text, **files})
        (aside / "config.yaml").write_bytes(text)
    return Imported(destination / step.relative_to(aside), folder, opened.name)


def model_files(folder: Path | None) -> dict[str, bytes]:
    """What a checkpoint has that came with the model, and goes on with it: config.json and generation_config.json.

    Args:
        folder: of the checkpoint; None: there is none.

    Raises:
        UserError: a file cannot be read.
    """
    return {} if folder is None else read_files(folder, _OF_MODEL)


def read_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Name -> content of those that there are.

    Raises:
        UserError: one cannot be read.
    """
    try:
        return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _open_tokenizer(folder: Folder, named: str | None) -> Tokenizer:
    if named is not None:
        return open_tokenizer(named, field="--tokenizer")
    if not any((folder.path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder.path}: holds no tokenizer: name one with --tokenizer bytes, or --tokenizer PATH")
    return open_tokenizer(str(folder.path), field="tokenizer")


def _config(folder: Folder, destination: Path, tokenizer: Tokenizer) -> Config:
    """A run's that would train the model; it is read, and overridden, when the model is decoded with."""
    model = folder.described.model
    assert model.max_position_embeddings is not None
    fields = {
        "name": destination.name,
        "runs": str(destination.parent),
        "model": model.model_dump(),
        "exits": folder.exits.model_dump(),
        "data": {
            "tokenizer": str(step_folder(destination, 0)) if tokenizer.files() else tokenizer.name,
            "sequence_length": min(model.max_position_embeddings, _SEQUENCE_LENGTH),
        },
        "training": {
            "train_iters": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "precision": folder.precision,
        },
    }
    try:
        return Config.model_validate(fields)
    except ValueError as error:
        raise UserError(f"{destination} cannot be a run: {' '.join(str(error).split())}") from error
