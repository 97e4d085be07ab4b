"""The safetensors files of a folder, by their headers: what tensors there are, and where their bytes lie.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, and the bytes of
the tensor, counted from the header's end), and the tensors' bytes, in rows.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.errors import UserError
from megatron_ee.huggingface.settings import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
LENGTH = struct.Struct("<Q")
ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of a number, by its dtype's name in the format."""

_MAX_HEADER = 100_000_000  # the format's own limit
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, unread.

    Attributes:
        dtype: as the format names it: F32, BF16, F16, ...
        start: of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model's folder, by name, in the order of its files.

    Raises:
        UserError: there are no safetensors, a file is missing, cut off or damaged, or lacks a tensor that the index
            says it has.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
    if (folder / WEIGHTS_FILE).exists():  # of both, transformers takes this one
        return read_header(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).exists():
        raise _no_weights(folder)
    places = _places(folder / INDEX_FILE)
    tensors: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(places.values()):
        header = read_header(folder / name)
        wanted = {tensor for tensor, file in places.items() if file == name}
        if missing := sorted(wanted - header.keys()):
            raise UserError(f"{folder / name}: lacks {missing[0]}, which {INDEX_FILE} says it has")
        tensors |= {tensor: stored for tensor, stored in header.items() if tensor in wanted}
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        UserError: it is missing, cut off or damaged.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            beginning = file.read(LENGTH.size)
            length = LENGTH.unpack(beginning)[0] if len(beginning) == LENGTH.size else size
            end = LENGTH.size + length
            if end > size or length > _MAX_HEADER:
                raise UserError(f"{path}: cut off or damaged: its header ends at byte {end}, the file at {size}")
            content = json.loads(file.read(length))
            tensors = {name: _stored(of, path, end) for name, of in content.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: its header is not one of safetensors ({error!r})") from error
    for name, stored in tensors.items():
        if (last := stored.start + stored.num_bytes) > size:
            raise UserError(f"{path}: cut off: {name} ends at byte {last}, the file at {size}")
    return tensors


def _stored(entry: Mapping[str, Any], path: Path, header_end: int) -> StoredTensor:
    """
    Raises:
        ValueError, KeyError, TypeError: it is no tensor.
    """
    start, stop = entry["data_offsets"]
    stored = StoredTensor(tuple(entry["shape"]), entry["dtype"], path, header_end + start)
    if any(type(number) is not int or number < 0 for number in (start, stop, *stored.shape)):
        raise ValueError(f"{entry}")
    if stop - start != stored.num_bytes:
        raise ValueError(f"{entry}: {stop - start} bytes")
    return stored


def _places(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: has no weight_map, tensor -> file")
    for tensor, name in places.items():
        if Path(name).name != name:
            raise UserError(f"{index}: {tensor} is said to be in {name!r}, out of the folder")
    return places


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return UserError(
            f"{folder}: {pickles[0]} is a pickle, which can run any code: it is not loaded; only {WEIGHTS_FILE} or "
            f"{INDEX_FILE} is"
        )
    return UserError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
