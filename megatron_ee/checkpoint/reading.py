"""Reads shards in threads, each straight into the tensor that wants it: nothing is read twice, not for its checksum
either, and copied only where a shard's bytes and the tensor's lie differently. Counterpart of `writing`."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_ee.checkpoint.checksum import Checksum
from megatron_ee.checkpoint.places import read_places

NUM_THREADS = 4
"""Files that a rank reads at the same time: one thread alone waits for the disk, then the disk for it."""


_CHUNK = 2**22
_LARGEST_GAP = 2**16
"""Bytes between two tensors that lie one behind the other: what torch.save writes around each."""


class ShardReader(CachedMetadataFileSystemReader):
    """What torch.distributed.checkpoint reads the tensors of a step folder by.

    Args:
        checksums: gets the checksum of each file that this rank reads from its beginning to its end; None: nobody asks.
    """

    def __init__(self, path: str | os.PathLike, checksums: dict[str, str] | None = None) -> None:
        super().__init__(path)
        self._checksums = checksums
        self._places = read_places(Path(path))
        self._tensors: Mapping[str, Any] = {}

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

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
            pieces = _Pieces(file, hashes=self._checksums is not None)
            for item in items:
                self._read_item(file, pieces, item, planner)
            if self._checksums is not None and (checksum := pieces.checksum_of_all()):
                self._checksums[name] = checksum

    def _read_item(self, file: BinaryIO, pieces: "_Pieces", item: ReadItem, planner: LoadPlanner) -> None:
        stored, start = self._place_of(item) or self._find(file, item)
        wanted = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if wanted.shape != target.shape:
            raise RuntimeError(f"{item.storage_index} is {tuple(wanted.shape)}, not {tuple(target.shape)}")
        if _lies_alike(wanted, target):
            pieces.fill(target, start + int(wanted.storage_offset()) * wanted.itemsize)
        else:
            target.copy_(_read(wanted, pieces, start))
        planner.commit_tensor(item, target)

    def _place_of(self, item: ReadItem) -> tuple[torch.Tensor, int] | None:
        """The shard, without its bytes, and where they begin in the file; None where no place is known."""
        index = item.storage_index
        shard, tensor = self.storage_data[index], self._tensors.get(index.fqn)
        place = self._places.get(shard.relative_path, {}).get(shard.offset)
        if place is None or not isinstance(tensor, TensorStorageMetadata):
            return None
        (chunk,) = (chunk for chunk in tensor.chunks if chunk.offsets == index.offset)
        return torch.empty(chunk.sizes, dtype=tensor.properties.dtype, device="meta"), place

    def _find(self, file: BinaryIO, item: ReadItem) -> tuple[torch.Tensor, int]:
        """Likewise, by what the file itself says."""
        content = self._slice_file(file, self.storage_data[item.storage_index])
        stored = torch.load(content, map_location="meta", weights_only=True)
        return stored, self._start(item) + stored.untyped_storage()._checkpoint_offset


class _Pieces:
    """A file that is read piece by piece; and its checksum, if that was from its beginning to its end."""

    def __init__(self, file: BinaryIO, *, hashes: bool) -> None:
        self._file = file
        self._checksum = Checksum() if hashes else None
        self._position = 0

    def fill(self, tensor: torch.Tensor, start: int) -> None:
        """Read a tensor's bytes, from so far into the file.

        Raises:
            EOFError: the file ends too early.
        """
        if self._checksum is not None:
            self._pass_over(start)
        self._file.seek(start)
        left = tensor.flatten().view(torch.uint8).numpy().data
        while left:
            num_bytes = self._file.readinto(left[:_CHUNK])  # type: ignore[attr-defined]  # it may give less
            if not num_bytes:
                raise EOFError(f"{self._file.name} ends too early")
            self._take(left[:num_bytes])
            left = left[num_bytes:]

    def checksum_of_all(self) -> str | None:
        """At the end; None where pieces were left out, or read again."""
        if self._checksum is not None:
            self._pass_over(os.fstat(self._file.fileno()).st_size)
        return None if self._checksum is None else self._checksum.hexdigest()

    def _pass_over(self, stop: int) -> None:
        """What lies before the next piece belongs to the file, too."""
        if not 0 <= stop - self._position <= _LARGEST_GAP:
            self._checksum = None
            return
        self._file.seek(self._position)
        while self._position < stop and (between := self._file.read(stop - self._position)):
            self._take(memoryview(between))

    def _take(self, piece: memoryview) -> None:
        if self._checksum is not None:
            self._checksum.update(piece)
            self._position += len(piece)


def _lies_alike(wanted: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the bytes in the file are those of the target, in one piece."""
    one_piece = wanted.is_contiguous() and target.is_contiguous()
    return one_piece and wanted.dtype == target.dtype and target.device.type == "cpu"


def _read(wanted: torch.Tensor, pieces: _Pieces, start: int) -> torch.Tensor:
    """In new memory; all of the storage where the wanted part lies in several pieces of it."""
    if wanted.is_contiguous():
        piece = torch.empty(wanted.shape, dtype=wanted.dtype)
        pieces.fill(piece, start + int(wanted.storage_offset()) * wanted.itemsize)
        return piece
    storage = torch.empty(wanted.untyped_storage().nbytes() // wanted.itemsize, dtype=wanted.dtype)
    pieces.fill(storage, start)
    return storage.as_strided(wanted.shape, wanted.stride(), wanted.storage_offset())
