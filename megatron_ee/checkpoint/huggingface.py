"""A Hugging Face folder in place of a checkpoint: described as one, and read for any layout's shards."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.fingerprint import fingerprint
from megatron_ee.checkpoint.models import has_tokenizer
from megatron_ee.checkpoint.reading import NUM_THREADS
from megatron_ee.config import ExitsConfig
from megatron_ee.huggingface.folder import Folder, open_folder
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.tokenizer import open_tokenizer

_BLOCK_BYTES = 1 << 24
"""Of whole rows that a thread has in memory, beside the tensor that its share of them goes to."""


@dataclass(frozen=True, slots=True)
class HuggingFaceSource:
    """An open folder; see `megatron_ee.checkpoint.sources.ModelSource`."""

    folder: Folder
    description: Description
    mesh: Mesh

    @property
    def path(self) -> Path:
        return self.folder.path

    def names(self) -> frozenset[str]:
        return frozenset(self.folder.recipes)

    def load(self, state: ShardedStateDict, *, asks_for_all: bool = True) -> dict[str, torch.Tensor]:
        """Each rank reads the rows that it has a share of, some at a time, and rounds them where its tensors are of
        another dtype."""
        del asks_for_all  # whoever asks, a shard is read by itself
        wholes = {name: entry.data for name, entry in state.items()}
        apply_factories(state)  # a matrix of two halves, each split over tensor-parallel ranks, becomes two shards
        shards = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
        self.mesh.on_all_ranks(lambda: self._fill_all(shards))
        return wholes

    def _fill_all(self, shards: Iterable[ShardedTensor]) -> None:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for _ in pool.map(self._fill, shards):
                pass  # here, what went wrong in a thread is raised

    def _fill(self, shard: ShardedTensor) -> None:
        shape, target = tuple(shard.global_shape), shard.data.detach()
        assert self.folder.recipes[shard.key].shape == shape, f"{shard.key} is {shape} in the model"
        rows, *columns = shard.global_slice()
        per_block = max(1, _BLOCK_BYTES // (target.element_size() * (shape[1] if columns else 1)))
        for start in range(rows.start, rows.stop, per_block):
            stop = min(rows.stop, start + per_block)
            block = self.folder.read_parameter(shard.key, slice(start, stop))
            target[start - rows.start : stop - rows.start].copy_(block[(slice(None), *columns)])


def open_huggingface(path: Path, mesh: Mesh, *, tokenizer: str = "") -> HuggingFaceSource:
    """A Hugging Face folder, of which headers are read. Collective.

    Args:
        tokenizer: the name of the one that it is used with, where the folder has none.

    Raises:
        UserError: see `open_folder`, and `open_tokenizer` of a tokenizer that the folder has; on all ranks.
    """
    name, files = mesh.from_main(lambda: (_name_of_tokenizer(path), fingerprint(path)))
    folder = mesh.on_all_ranks(lambda: open_folder(path))
    description = Description(
        model=folder.described.model,
        exits=_weighted(folder.exits, folder.described.model.num_layers),
        precision=folder.precision,
        tokenizer=name or tokenizer,
        vocab_size=folder.described.vocab_size,
        progress=Progress(0, 0),
        files=files,
        has_optimizer=False,
    )
    return HuggingFaceSource(folder, description, mesh)


def _weighted(exits: ExitsConfig, num_layers: int) -> ExitsConfig:
    """With the weights that a config gives exits by default: the folder says nothing of how they were trained."""
    return exits.model_copy(update={"weights": tuple(layer / num_layers for layer in exits.layers)})


def _name_of_tokenizer(path: Path) -> str:
    return open_tokenizer(str(path)).name if has_tokenizer(path) else ""
