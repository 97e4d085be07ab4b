"""What can be said of a folder that holds a model before its parameters are read; imports no torch."""

from pathlib import Path

from megatron_ee.checkpoint.description import hash_of, read_description
from megatron_ee.checkpoint.fingerprint import fingerprint
from megatron_ee.checkpoint.folders import find_checkpoint, is_huggingface
from megatron_ee.config import ExitsConfig, ModelConfig
from megatron_ee.errors import UserError
from megatron_ee.huggingface.architecture import model_config_of
from megatron_ee.huggingface.exit_files import read_exits

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_model(path: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder, a run or a step folder; the vocabulary is the folder's own.

    Raises:
        UserError: it is none of these, or holds what cannot be read.
    """
    if is_huggingface(path):
        return model_config_of(path).model
    try:
        description = read_description(find_checkpoint(path))
    except UserError as error:
        raise UserError(str(error).removeprefix("checkpoint: ")) from error
    return description.model.model_copy(update={"vocab_size": description.vocab_size})


def exits_in(path: Path) -> ExitsConfig:
    """The early exits beside a Hugging Face model; none where it says nothing of any.

    Raises:
        UserError: exits.json, or the model's config.json, cannot be read.
    """
    return read_exits(path, model_config_of(path).model)


def has_tokenizer(path: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def hash_of_model(folder: Path) -> str:
    """What a step folder or a Hugging Face folder is known by: its description's hash, or that of its `fingerprint`.

    Raises:
        UserError: it cannot be read.
    """
    return hash_of(fingerprint(folder)) if is_huggingface(folder) else read_description(folder).hash
