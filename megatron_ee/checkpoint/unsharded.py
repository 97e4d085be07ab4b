"""Reads the parameters of a step folder one by one, or some rows of one, whatever layout wrote it and without a model:
no more is in memory than what is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ee.checkpoint.folders import CheckpointError
from megatron_ee.checkpoint.reading import ShardReader
from megatron_ee.checkpoint.unpickling import check_pickles


class StepReader:
    """The tensors of a step folder.

    Attributes:
        shapes: of every tensor, by the name of the whole model's parameter; among them are an optimizer's.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder holds pickles that could run any code, or is damaged.
        """
        check_pickles(folder)
        self._folder, self._reader = folder, ShardReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(
            {name: tuple(stored.size) for name, stored in self._stored.items()}
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` - 1 of a tensor, in new memory.

        Raises:
            CheckpointError: a file is not what it was.
        """
        stored = self._stored[name]
        height, *rest = stored.size
        rows = (height if stop is None else stop) - start
        wanted = ChunkStorageMetadata(torch.Size([start, *(0 for _ in rest)]), torch.Size([rows, *rest]))
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        tensor = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), cast(LoadPlanner, _Target(tensor)))
        except (OSError, EOFError, UnpicklingError, RuntimeError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read: {error}") from error
        return tensor


@dataclass(frozen=True, slots=True)
class _Target:
    """What a reader asks of a planner: where to put what it has read."""

    tensor: torch.Tensor

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return narrow_tensor_by_index(self.tensor, item.dest_offsets, item.lengths)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """It lies where it should."""


def check_whole(reader: StepReader, expected: Iterable[tuple[str, tuple[int, ...]]], folder: Path) -> None:
    """
    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    for name, shape in expected:
        if (found := reader.shapes.get(name)) != shape:
            what = "missing" if found is None else f"{list(found)}, not {list(shape)}"
            raise CheckpointError(f"{folder}: the parameter {name} is {what}")
