"""What a model's parameters are read from, in any layout: step folders of ours, and Hugging Face's folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_ee.checkpoint.description import Description, Origin
from megatron_ee.checkpoint.folders import CheckpointError, find_model, is_huggingface, is_whole, whole_checkpoints
from megatron_ee.checkpoint.huggingface import open_huggingface
from megatron_ee.checkpoint.models import hash_of_model
from megatron_ee.checkpoint.sharded import load_checkpoint, names_in
from megatron_ee.checkpoint.verify import verify
from megatron_ee.errors import UserError
from megatron_ee.parallel.mesh import Mesh


class ModelSource(Protocol):
    """A folder with a model's parameters.

    Attributes:
        description: of the model, as of a checkpoint's; its hash says whether it is the very same folder.
    """

    @property
    def path(self) -> Path: ...

    @property
    def description(self) -> Description: ...

    def names(self) -> frozenset[str]:
        """Of the parameters, in the whole model, and maybe of other things."""
        ...

    def load(self, state: dict[str, Any], *, asks_for_all: bool = True) -> dict[str, Any]:
        """Fill the tensors of a state; returns them by their names in it. Collective.

        Args:
            asks_for_all: whether the ranks' states together are whole tensors, with a main copy each.

        Raises:
            UserError: the folder is damaged; on all ranks.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepFolder:
    """A whole checkpoint."""

    path: Path
    description: Description

    def names(self) -> frozenset[str]:
        return names_in(self.path)

    def load(self, state: dict[str, Any], *, asks_for_all: bool = True) -> dict[str, Any]:
        loaded: dict[str, Any] = load_checkpoint(self.path, {"model": state}, asks_for_all=asks_for_all)
        parameters: dict[str, Any] = loaded.get("model", {})
        return parameters


def open_source(path: Path, mesh: Mesh, *, reads_all: bool, tokenizer: str = "") -> ModelSource:
    """A step folder or a Hugging Face folder. Collective.

    Args:
        reads_all: whether a checkpoint's files are read and compared with what was saved. Of a Hugging Face folder,
            which says nothing of that, it is looked whether all tensors are there.
        tokenizer: the name of the one that the model is used with, where the folder has none of its own.

    Raises:
        CheckpointError: it is damaged, or of a format or an architecture that is not known; on all ranks.
    """
    if not mesh.from_main(lambda: is_huggingface(path)):
        return StepFolder(path, verify(path, mesh, reads="all" if reads_all else "nothing"))
    try:
        return open_huggingface(path, mesh, tokenizer=tokenizer)
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"checkpoint: {error}") from error


def find_source(path: Path, began_with: Origin | None) -> Path:
    """What a path means: a Hugging Face folder, a step folder, or of a run the newest, or the one that a run began
    with.

    Raises:
        CheckpointError: there is none, or none that the run began with.
    """
    folder = find_model(path)
    if began_with is None:
        return folder
    is_one = is_whole(path) or is_huggingface(path)
    for candidate in [path] if is_one else whole_checkpoints(path).values():
        if hash_of_model(candidate) == began_with.hash:
            return candidate
    raise CheckpointError(
        f"{path} is not what the run began with, {began_with.path}, whose hash is {began_with.hash[:12]}..."
    )
