"""Writes the files of one rank in threads of their own, hashing on the way: what was written is not read back."""

import hashlib
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

import torch
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # what torch's reader wants to find in the metadata
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

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
_BYTES_BETWEEN_SYNCS = 2**26


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
    """What came of it: where each item lies, and the SHA-256 of each file by its name."""

    results: list[WriteResult] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


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
            self._tasks.append(_Task(_writer_of(folder / f"{prefix}{number}.distcp", share)))

    def wait(self, seconds: float = 0) -> bool:
        """Whether it has ended, well or not, at most so much later."""
        deadline = time.monotonic() + seconds
        for task in self._tasks:
            task.join(max(0.0, deadline - time.monotonic()))
        return not any(task.is_alive() for task in self._tasks)

    def result(self) -> Written:
        """What came of it, at the end.

        Raises:
            Exception: what went wrong first; mostly OSError.
        """
        all_of_it = Written()
        for task in self._tasks:
            task.join()
            if task.error is not None:
                raise task.error
            all_of_it.results += task.written.results
            all_of_it.digests |= task.written.digests
        return all_of_it


def write_file(path: Path, content: bytes) -> str:
    """Write a small file to the disk itself; returns its SHA-256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def write_metadata(folder: Path, metadata: Metadata, parts: Sequence[Written]) -> dict[str, str]:
    """Say where each shard lies; returns the digests of all files.

    Args:
        metadata: names, shapes and offsets of the shards, yet without places in files.
        parts: what all ranks have written.
    """
    places = {result.index: result.storage_data for part in parts for result in part.results}
    metadata = replace(metadata, storage_data=places, version=CURRENT_DCP_VERSION)
    digests = {name: digest for part in parts for name, digest in part.digests.items()}
    digests[".metadata"] = write_file(folder / ".metadata", pickle.dumps(metadata))
    digests["metadata.json"] = write_file(folder / "metadata.json", json.dumps(_BACKENDS).encode())
    return digests


class _Task(threading.Thread):
    def __init__(self, work: Callable[[], Written]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work, self.written = work, Written()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.written = self._work()
        except Exception as error:  # whatever it is, it must reach the rank, and from there all ranks
            self.error = error


class _HashedFile:
    """What torch.save writes to. Errors are kept for `close`: torch.save would make them unrecognisable."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._unsynced = 0
        self._error: OSError | None = None
        self.position = 0

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        self.position += len(left)
        try:
            for start in range(0, len(left), _CHUNK):
                self._write(left[start : start + _CHUNK])
        except OSError as error:
            self._error = self._error or error
        return len(left)

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
        """See that it is on the disk; returns its SHA-256."""
        with self._file:
            self.check()
            os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def _write(self, chunk: memoryview) -> None:
        if self._error is not None:
            return
        self._sha256.update(chunk)
        while chunk:
            num_bytes = self._file.write(chunk)
            chunk, self._unsynced = chunk[num_bytes:], self._unsynced + num_bytes
        if self._unsynced >= _BYTES_BETWEEN_SYNCS:  # or the disk would have nothing to do until the end
            os.fdatasync(self._file.fileno())
            self._unsynced = 0


def _writer_of(path: Path, items: Sequence[Item]) -> Callable[[], Written]:
    return lambda: _write_items(path, items)


def _write_items(path: Path, items: Sequence[Item]) -> Written:
    written, file = Written(), _HashedFile(path)
    try:
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # SHA-256 says more
            for item, data in items:
                written.results.append(_write_item(file, path.name, item, data))
                file.check()
    finally:
        written.digests[path.name] = file.close()
    return written


def _write_item(file: _HashedFile, name: str, item: WriteItem, data: torch.Tensor | BytesIO | Unread) -> WriteResult:
    start = file.position
    if isinstance(data, Unread):
        data = data.make()
    if isinstance(data, BytesIO):
        file.write(data.getbuffer())
    else:
        torch.save(_alone(data), cast(BinaryIO, file))  # it asks for no more than `write` and `flush`
    length = file.position - start
    return WriteResult(item.index, length, _StorageInfo(name, start, length))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """In host memory, and all of its storage: torch.save writes storages."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_files(folder: Path, files: Mapping[str, bytes]) -> Written:
    return Written(digests={name: write_file(folder / name, content) for name, content in files.items()})


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
