"""Writes safetensors files whose tensors are not in memory: a header needs no more than names and shapes."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ee.config import Precision
from megatron_ee.errors import UserError
from megatron_ee.huggingface.headers import INDEX_FILE, ITEM_SIZES, LENGTH, WEIGHTS_FILE

_DTYPES: Mapping[Precision, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_ALIGNMENT = 8  # of the header's end, as the format's own library has it
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES_BETWEEN_SYNCS = 2**26

Produce = Callable[[str], Iterable[torch.Tensor]]
"""Gives a tensor by its name, in pieces: its rows from first to last."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, and the tensors in it with their shapes."""

    file: str
    tensors: Mapping[str, tuple[int, ...]]


def plan_shards(shapes: Mapping[str, tuple[int, ...]], precision: Precision, shard_size: int) -> list[Shard]:
    """Share tensors among files, in their order; a file has one that is too large alone.

    Args:
        shard_size: bytes of tensors in a file, at most.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = _num_bytes(shape, precision)
        if groups[-1] and size + num_bytes > shard_size:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += num_bytes
    if len(groups) == 1:
        return [Shard(WEIGHTS_FILE, groups[0])]
    name = WEIGHTS_FILE.removesuffix(".safetensors")
    return [
        Shard(f"{name}-{number:05d}-of-{len(groups):05d}.safetensors", tensors)
        for number, tensors in enumerate(groups, start=1)
    ]


def index_of(shards: Sequence[Shard], precision: Precision) -> bytes | None:
    """The content of the index file; None where one file is all."""
    if len(shards) == 1:
        return None
    places = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(_num_bytes(shape, precision) for shard in shards for shape in shard.tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode()


def write_model(folder: Path, shards: Sequence[Shard], precision: Precision, produce: Produce) -> None:
    """Write the files of a model, and their index.

    Raises:
        OSError: they cannot be written.
    """
    for shard in shards:
        write_tensors(folder / shard.file, shard.tensors, precision, produce)
    if (index := index_of(shards, precision)) is not None:
        write_small(folder / INDEX_FILE, index)


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], precision: Precision, produce: Produce) -> None:
    """Write one safetensors file, to the disk itself.

    Raises:
        OSError: it cannot be written.
    """
    unsynced = 0
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(shapes, precision, produce):
            left = piece
            while left:
                num_bytes = file.write(left)
                left, unsynced = left[num_bytes:], unsynced + num_bytes
            if unsynced >= _BYTES_BETWEEN_SYNCS:  # or the disk would have nothing to do until the end
                os.fdatasync(file.fileno())
                unsynced = 0
        os.fsync(file.fileno())


def write_small(path: Path, content: bytes) -> None:
    """Write a small file to the disk itself."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def parse_size(text: str) -> int:
    """Bytes from what a user writes: 5GB, 500MB, 2GiB, or a number of bytes.

    Raises:
        UserError: it is no size, or none above zero.
    """
    number = text.upper().rstrip("BIGKM")
    try:
        size = int(float(number) * _UNITS[text.upper()[len(number) :].strip() or "B"])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--shard-size: {text!r} is no size: write 5GB, 500MB or a number of bytes")
    return size


def _pieces(shapes: Mapping[str, tuple[int, ...]], precision: Precision, produce: Produce) -> Iterator[memoryview]:
    yield memoryview(_header(shapes, precision))
    for name, shape in shapes.items():
        left = _num_bytes(shape, precision)
        for piece in produce(name):
            left -= piece.nbytes
            yield piece.contiguous().view(-1).view(torch.uint8).numpy().data
        assert left == 0, f"{name}: {left} bytes are left"


def _header(shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        stop = at + _num_bytes(shape, precision)
        entries[name] = {"dtype": _DTYPES[precision], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return LENGTH.pack(len(content)) + content


def _num_bytes(shape: tuple[int, ...], precision: Precision) -> int:
    return math.prod(shape) * ITEM_SIZES[_DTYPES[precision]]
