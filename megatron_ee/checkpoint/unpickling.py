"""A checkpoint may come from anywhere, and unpickling runs what it is told to. Two kinds of content in megatron-core's
format are pickles that it loads without asking: the metadata, and objects among the shards. They are gone through here
first, with nothing allowed but what saving writes. Everything else it loads as torch.load does with `weights_only`."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_ee.checkpoint.folders import CheckpointError, DamagedError

_CLASSES = (
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {(kind.__module__, kind.__name__): kind for kind in _CLASSES} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # by which torch pickles torch.strided
}


def check_pickles(folder: Path) -> None:
    """
    Raises:
        DamagedError: they are none.
        CheckpointError: they ask for what no checkpoint needs.
    """
    path = folder / ".metadata"
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes())).load()
        for index, place in content.storage_data.items():
            if Path(place.relative_path).name != place.relative_path:
                raise CheckpointError(f"{path} points out of the folder: {place.relative_path}")
            if isinstance(content.state_dict_metadata[index.fqn], metadata.BytesStorageMetadata):
                _check_object(folder / place.relative_path, place.offset, place.length)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a torn pickle may raise anything
        raise DamagedError(f"{folder} is damaged: .metadata is not what was saved ({error})") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(
            f"a checkpoint's metadata asks for {module}.{name}, which could run any code: it is not loaded"
        )


def _check_object(path: Path, start: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        content = io.BytesIO(file.read(length))
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds an object that could run any code: it is not loaded") from error
