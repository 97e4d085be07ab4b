"""Megatron's indexed dataset on disk: a .bin of tokens and an .idx that says where documents begin.

Written and read here without megatron-core, which takes seconds and hundreds of megabytes to import; a test says that
megatron-core's own writer makes the same bytes. Datasets written here have a third file, .meta.json, that says which
tokenizer they are of.
"""

import json
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ee.data.aside import written_aside
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of tokens, number of sequences, number of document borders
_TYPES = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_MAX_LENGTH = 2**31 - 1


class DatasetError(UserError):
    """A dataset cannot be read or written, or is too small for what is asked of it."""


@dataclass(frozen=True, slots=True)
class Index:
    """What an .idx says.

    Attributes:
        lengths: int32, tokens of each sequence; a sequence is a document, but where another tool chose otherwise.
    """

    dtype: np.dtype
    lengths: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


class IndexedWriter:
    """Takes documents in order; holds twelve bytes of memory for each. `write_aside` makes one."""

    def __init__(self, aside: Path, tokenizer: Tokenizer) -> None:
        self.dtype = token_type(tokenizer.vocab_size)
        self.num_tokens = 0
        self._aside, self._tokenizer = aside, tokenizer
        self._lengths = array("i")
        self._file: BinaryIO = bin_path(aside).open("wb")

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents that follow each other in `tokens`.

        Raises:
            DatasetError: a document is longer than the format can say.
        """
        if max(lengths, default=0) > _MAX_LENGTH:
            raise DatasetError(f"a document of {max(lengths)} tokens; the format takes {_MAX_LENGTH}: split it")
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def close(self) -> None:
        self._file.close()

    def finish(self) -> None:
        """End the .bin and write what belongs to it."""
        _sync(self._file)
        self.close()
        meta = {
            "tokenizer": self._tokenizer.name,
            "vocab_size": self._tokenizer.vocab_size,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
        }
        meta_path(self._aside).write_text(json.dumps(meta, indent=1) + "\n")
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        code = next(code for code, dtype in _TYPES.items() if dtype == self.dtype)
        with index_path(self._aside).open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write((pointers * self.dtype.itemsize).data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)
            _sync(file)


@contextmanager
def write_aside(
    prefix: Path, tokenizer: Tokenizer, *, companions: Mapping[Path, Path] | None = None
) -> Iterator[IndexedWriter]:
    """A writer whose files appear under their names when the block ends well, the index last: until then there is
    nothing that loads, and when the block raises or the process is killed there never is.

    Args:
        companions: files written aside by others -> names that they get together with the dataset.
    """
    with written_aside(prefix) as aside:
        writer = IndexedWriter(aside, tokenizer)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()
        index_path(prefix).unlink(missing_ok=True)  # of a dataset that this one replaces
        for companion, name in (companions or {}).items():
            companion.replace(name)
        for path_of in (meta_path, bin_path, index_path):
            path_of(aside).replace(path_of(prefix))


def write_indexed(prefix: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Write each document's tokens and an end-of-document token."""
    with write_aside(prefix, tokenizer) as writer:
        for text in documents:
            tokens = [*tokenizer.encode(text), tokenizer.eod]
            writer.add(np.array(tokens, dtype=writer.dtype), [len(tokens)])


def read_index(prefix: Path) -> Index:
    """
    Raises:
        DatasetError: a file is missing, the .idx is of another format, or one of the two was cut short.
    """
    for path in (bin_path(prefix), index_path(prefix)):
        if not path.exists():
            raise DatasetError(f"{path} does not exist")
    path = index_path(prefix)
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    magic, version, code, num_sequences, num_borders = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if magic != _MAGIC or version != _VERSION or code not in _TYPES:
        raise DatasetError(f"{path} is no index of a Megatron dataset")
    if path.stat().st_size < _HEADER.size + 12 * num_sequences + 8 * num_borders:
        raise DatasetError(f"{path} is cut short")
    if not num_sequences:
        raise DatasetError(f"{path} lists no documents")
    lengths = np.memmap(path, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(num_sequences,))
    index = Index(np.dtype(_TYPES[code]), lengths)
    if bin_path(prefix).stat().st_size < index.num_tokens * index.dtype.itemsize:
        raise DatasetError(f"{bin_path(prefix)} is cut short: {path.name} lists {index.num_tokens} tokens")
    return index


def read_tokens(prefix: Path) -> np.ndarray:
    """All tokens of a dataset, in order, mapped from the file.

    Raises:
        DatasetError: see `read_index`.
    """
    index = read_index(prefix)
    return np.memmap(bin_path(prefix), dtype=index.dtype, mode="r", shape=(index.num_tokens,))


def read_meta(prefix: Path) -> dict[str, Any]:
    """What .meta.json says; empty for a dataset of another tool."""
    try:
        return json.loads(meta_path(prefix).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DatasetError(f"{meta_path(prefix)} is damaged ({error})") from error


def token_type(vocab_size: int) -> np.dtype:
    """The type that Megatron keeps the tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def index_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def meta_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".meta.json")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
