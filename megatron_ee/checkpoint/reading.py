"""Reads shards in threads, each straight into the tensor that wants it: nothing is read twice, and copied only where a
shard's bytes and the tensor's lie differently. Counterpart of `writing`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

NUM_THREADS = 4
"""Files that a rank reads at the same time: one thread alone waits for the disk, then the disk for it."""


class ShardReader(CachedMetadataFileSystemReader):
    """What torch.distributed.checkpoint reads the tensors of a step folder by."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan.

        Raises:
            OSError, EOFError, RuntimeError, UnpicklingError: a file is not what it was.
        """
        assert all(item.type is LoadItemType.TENSOR for item in plan.items), "states have no objects among the shards"
        by_file: dict[str, list[ReadItem]] = {}
        for item in sorted(plan.items, key=self._start):
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for _ in pool.map(lambda name: self._read_file(name, by_file[name], planner), by_file):
                pass  # here, what went wrong in a thread is raised
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _start(self, item: ReadItem) -> int:
        start: int = self.storage_data[item.storage_index].offset
        return start

    def _read_file(self, name: str, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        with open(os.path.join(self.path, name), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for item in items:
                self._read_item(file, item, planner)

    def _read_item(self, file: BinaryIO, item: ReadItem, planner: LoadPlanner) -> None:
        content = self._slice_file(file, self.storage_data[item.storage_index])
        stored = torch.load(content, map_location="meta", weights_only=True)  # where and how it lies, without its bytes
        start = self._start(item) + stored.untyped_storage()._checkpoint_offset
        wanted = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if wanted.shape != target.shape:
            raise RuntimeError(f"{item.storage_index} is {tuple(wanted.shape)}, not {tuple(target.shape)}")
        if _lies_alike(wanted, target):
            _fill(target, file, start + wanted.storage_offset() * wanted.itemsize)
        else:
            target.copy_(_read(wanted, file, start))
        planner.commit_tensor(item, target)


def _lies_alike(wanted: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the bytes in the file are those of the target, in one piece."""
    one_piece = wanted.is_contiguous() and target.is_contiguous()
    return one_piece and wanted.dtype == target.dtype and target.device.type == "cpu"


def _read(wanted: torch.Tensor, file: BinaryIO, start: int) -> torch.Tensor:
    """In new memory; all of the storage where the wanted part lies in several pieces of it."""
    if wanted.is_contiguous():
        piece = torch.empty(wanted.shape, dtype=wanted.dtype)
        _fill(piece, file, start + int(wanted.storage_offset()) * wanted.itemsize)
        return piece
    storage = torch.empty(wanted.untyped_storage().nbytes() // wanted.itemsize, dtype=wanted.dtype)
    _fill(storage, file, start)
    return storage.as_strided(wanted.shape, wanted.stride(), wanted.storage_offset())


def _fill(tensor: torch.Tensor, file: BinaryIO, start: int) -> None:
    left = tensor.flatten().view(torch.uint8).numpy().data
    file.seek(start)
    while left:
        num_bytes = file.readinto(left)  # type: ignore[attr-defined]  # a file without a buffer may give less
        if not num_bytes:
            raise EOFError(f"{file.name} ends too early")
        left = left[num_bytes:]
