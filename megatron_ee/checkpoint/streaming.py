"""Writes a checkpoint of parameters that are not in memory: each is read piece by piece, when its turn comes."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_ee.checkpoint.description import Description, write_description
from megatron_ee.checkpoint.folders import PLAIN_VALUES_FILE, link_latest, step_folder
from megatron_ee.checkpoint.writing import BackgroundWriting, Item, Unread, write_metadata
from megatron_ee.interrupts import interrupts_deferred
from megatron_ee.model.precision import DTYPES

_CHUNK_BYTES = 2**25  # each of the writer's threads has one such chunk in memory, and torch.save a copy
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Streamed:
    """A parameter to write.

    Attributes:
        name: as in `Stage.global_name`.
        read: gives rows of it; called in threads, several at a time.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]


def write_streamed(
    run: Path, parameters: Sequence[Streamed], description: Description, files: Mapping[str, bytes]
) -> Path:
    """Write a step folder without optimizer state into a run's folder; returns it. One process does it, in the memory
    that a few chunks take.

    Args:
        files: name -> content of what the step folder needs beside the parameters, to stand alone.

    Raises:
        OSError: it cannot be written. There is no checkpoint then.
        UserError: what reading a parameter raises.
    """
    folder = step_folder(run, description.progress.iteration)
    folder.mkdir(parents=True)
    stopped = threading.Event()
    dtype = DTYPES[description.precision]
    items = [item for parameter in parameters for item in _items(parameter, dtype, stopped)]
    common = BytesIO()
    torch.save({}, common)
    writing = None
    try:
        with interrupts_deferred():  # or threads could be at work that nobody knows of
            writing = BackgroundWriting(folder, "__0_", items, {PLAIN_VALUES_FILE: common.getvalue(), **files})
        _wait(writing)
    finally:
        stopped.set()  # nobody writes into a folder that is being removed
        if writing is not None:
            _wait(writing)
    metadata = Metadata(state_dict_metadata=dict(_storage(items)))
    checksums = write_metadata(folder, metadata, [writing.result()])
    write_description(folder, replace(description, files=checksums, has_optimizer=False))
    link_latest(folder)
    return folder


def _wait(writing: BackgroundWriting) -> None:
    while not writing.wait(_POLL_S):
        pass


def _items(parameter: Streamed, dtype: torch.dtype, stopped: threading.Event) -> Iterator[Item]:
    """Chunks of a parameter's rows, each to be read when it is written."""
    row_bytes = math.prod(parameter.shape[1:]) * dtype.itemsize
    height = max(1, _CHUNK_BYTES // row_bytes)
    properties = TensorProperties(dtype=dtype)
    for start in range(0, parameter.shape[0], height):
        stop = min(start + height, parameter.shape[0])
        offsets = torch.Size([start, *(0 for _ in parameter.shape[1:])])
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([stop - start, *parameter.shape[1:]]))
        item = WriteItem(
            index=MetadataIndex(parameter.name, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(parameter.shape)),
        )
        read = partial(_read, parameter, slice(start, stop), dtype, stopped)
        yield item, Unread((stop - start) * row_bytes, read)


def _read(parameter: Streamed, rows: slice, dtype: torch.dtype, stopped: threading.Event) -> torch.Tensor:
    if stopped.is_set():
        raise InterruptedError("writing was stopped")
    chunk = parameter.read(rows)
    assert chunk.dtype == dtype and chunk.shape == (rows.stop - rows.start, *parameter.shape[1:]), parameter.name
    return chunk


def _storage(items: Sequence[Item]) -> dict[str, TensorStorageMetadata]:
    storage: dict[str, TensorStorageMetadata] = {}
    for item, _ in items:
        data = item.tensor_data
        assert data is not None
        tensor = storage.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        tensor.chunks.append(data.chunk)
    return storage
