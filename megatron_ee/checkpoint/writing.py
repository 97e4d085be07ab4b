"""Writes the files of one rank in threads of their own, hashing on the way: what was written is not read back."""

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # what torch's reader wants to find in the metadata
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_ee.checkpoint.checksum import Checksum, checksum_of
from megatron_ee.checkpoint.folders import SHARD_SUFFIX
from megatron_ee.checkpoint.places import PLACES_FILE, Places, places_json

_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What megatron-core reads by."""

NUM_SHARD_FILES = 3
"""Files of a rank, written at the same time: while the disk takes one, others are hashed."""

_CHUNK = 2**22
_BYTES_TO_BEGIN_WITH = 2**24


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor that is made when its turn to be written comes, and is gone afterwards.

    Attributes:
        make: called in a thread of the writer's; what it raises, the writing does.
    """

    num_bytes: int
    make: Callable[[], torch.Tensor]


Item = tuple[WriteItem, torch.Tensor | BytesIO | Unread]


@dataclass
class Written:
    """What came of it: where each item lies, and where the bytes of each tensor; the checksum of each file by name."""

    results: list[WriteResult] = field(default_factory=list)
    places: Places = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


class BackgroundWriting:
    """One rank's shard files, and small files beside them, on their way to a folder.

    Its threads end with the process, whatever they are at: what they leave is no checkpoint.

    Args:
        prefix: what the names of shard files begin with.
        items: what to write; none of it may change until the end.
        files: name -> content.
    """

    def __init__(self, folder: Path, prefix: str, items: Sequence[Item], files: Mapping[str, bytes]) -> None:
        self._tasks = [_Task(lambda: _write_files(folder, files))]
        for number, share in enumerate(_split(items)):
            self._tasks.append(_Task(_writer_of(folder / f"{prefix}{number}{SHARD_SUFFIX}", share)))

    def wait(self, seconds: float = 0) -> bool:
        """Whether it has ended, well or not, at most so much later."""
        deadline = time.monotonic() + seconds
        for task in self._tasks:
            task.ended.wait(max(0.0, deadline - time.monotonic()))
        return all(task.ended.is_set() for task in self._tasks)

    def result(self) -> Written:
        """What came of it, at the end.

        Raises:
            Exception: what went wrong first; mostly OSError.
        """
        all_of_it = Written()
        for task in self._tasks:
            task.ended.wait()
            if task.error is not None:
                raise task.error
            all_of_it.results += task.written.results
            all_of_it.places |= task.written.places
            all_of_it.checksums |= task.written.checksums
        return all_of_it


def write_file(path: Path, content: bytes) -> str:
    """Write a small file to the disk itself; returns its checksum."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return checksum_of(content)


def write_metadata(folder: Path, metadata: Metadata, parts: Sequence[Written]) -> dict[str, str]:
    """Say where each shard lies; returns the checksums of all files.

    Args:
        metadata: names, shapes and offsets of the shards, yet without places in files.
        parts: what all ranks have written.
    """
    shards = {result.index: result.storage_data for part in parts for result in part.results}
    metadata = replace(metadata, storage_data=shards, version=CURRENT_DCP_VERSION)
    places = {name: of_file for part in parts for name, of_file in part.places.items()}
    checksums = {name: checksum for part in parts for name, checksum in part.checksums.items()}
    checksums[PLACES_FILE] = write_file(folder / PLACES_FILE, places_json(places))
    checksums[".metadata"] = write_file(folder / ".metadata", pickle.dumps(metadata))
    checksums["metadata.json"] = write_file(folder / "metadata.json", json.dumps(_BACKENDS).encode())
    return checksums


class _Task(threading.Thread):
    """Others wait for `ended`: a thread whose `join` is interrupted by Ctrl-C counts as ended in Python 3.11."""

    def __init__(self, work: Callable[[], Written]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work, self.written = work, Written()
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.written = self._work()
        except Exception as error:  # whatever it is, it must reach the rank, and from there all ranks
            self.error = error
        finally:
            self.ended.set()


class _HashedFile:
    """What torch.save writes to. Errors are kept for `close`: torch.save would make them unrecognisable."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._checksum = Checksum()
        self._waiting = 0
        self._error: OSError | None = None
        self.position = 0
        self._looked_for, self._found = 0, -1

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        if left and np.frombuffer(left, np.uint8).ctypes.data == self._looked_for:
            self._found = self.position
        self.position += len(left)
        try:
            for start in range(0, len(left), _CHUNK):
                self._write(left[start : start + _CHUNK])
        except OSError as error:
            self._error = self._error or error
        return len(left)

    def look_for(self, tensor: torch.Tensor) -> None:
        """Note where the bytes of a tensor go, for `found`."""
        self._looked_for, self._found = tensor.data_ptr(), -1

    @property
    def found(self) -> int | None:
        """The position of the tensor's bytes; None where they were not written as they lie in memory."""
        return self._found if self._found >= 0 else None

    def flush(self) -> None:
        """Nothing is buffered."""

    def check(self) -> None:
        """
        Raises:
            OSError: something could not be written.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> str:
        """See that it is on the disk; returns its checksum."""
        with self._file:
            self.check()
            os.fsync(self._file.fileno())
        return self._checksum.hexdigest()

    def _write(self, chunk: memoryview) -> None:
        if self._error is not None:
            return
        self._checksum.update(chunk)
        while chunk:
            num_bytes = self._file.write(chunk)
            chunk, self._waiting = chunk[num_bytes:], self._waiting + num_bytes
        if self._waiting >= _BYTES_TO_BEGIN_WITH:
            self._let_the_disk_begin()

    def _let_the_disk_begin(self) -> None:
        """Or it would have nothing to do until the end. Linux begins to write what it is told to forget, and nobody
        waits for it, as one would for fdatasync."""
        end = self._file.tell()
        os.posix_fadvise(self._file.fileno(), end - self._waiting, self._waiting, os.POSIX_FADV_DONTNEED)
        self._waiting = 0


def _writer_of(path: Path, items: Sequence[Item]) -> Callable[[], Written]:
    return lambda: _write_items(path, items)


def _write_items(path: Path, items: Sequence[Item]) -> Written:
    written, file = Written(), _HashedFile(path)
    places = written.places[path.name] = {}
    try:
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # ours covers more
            for item, data in items:
                start = file.position
                place = _write_item(file, data.make() if isinstance(data, Unread) else data)
                shard = _StorageInfo(path.name, start, file.position - start)
                written.results.append(WriteResult(item.index, shard.length, shard))
                if place is not None:
                    places[start] = place
                file.check()
    finally:
        written.checksums[path.name] = file.close()
    return written


def _write_item(file: _HashedFile, data: torch.Tensor | BytesIO) -> int | None:
    """Where the bytes of a tensor begin, if they lie there one row after the other."""
    if isinstance(data, BytesIO):
        file.write(data.getbuffer())
        return None
    alone = _alone(data)
    file.look_for(alone)
    torch.save(alone, cast(BinaryIO, file))  # it asks for no more than `write` and `flush`
    return file.found if alone.is_contiguous() else None


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory, and all of its storage: torch.save writes storages."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_files(folder: Path, files: Mapping[str, bytes]) -> Written:
    return Written(checksums={name: write_file(folder / name, content) for name, content in files.items()})


def _split(items: Sequence[Item]) -> list[list[Item]]:
    """Shares of about as many bytes, without empty ones."""
    shares: list[list[Item]] = [[] for _ in range(NUM_SHARD_FILES)]
    sizes = [0] * NUM_SHARD_FILES
    for item in sorted(items, key=_num_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += _num_bytes(item)
    return [share for share in shares if share]


def _num_bytes(item: Item) -> int:
    data = item[1]
    if isinstance(data, Unread):
        return data.num_bytes
    return data.getbuffer().nbytes if isinstance(data, BytesIO) else data.nbytes
