"""megatron-core's sample indices, kept from run to run: one rank builds them, and a folder of them is whole or absent.

megatron-core takes any index file that it finds for a whole one, and goes by a dataset's path, not by what lies there.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_ee.data.aside import aside_of, remove_leftovers
from megatron_ee.data.indexed import index_path
from megatron_ee.parallel.mesh import Mesh


@contextmanager
def index_cache(folder: Path, key: object, prefixes: Sequence[Path], mesh: Mesh) -> Iterator[Path]:
    """The folder that the block builds its indices in, or finds them; all ranks enter and leave together.

    It is named after all that the indices depend on, and gets that name when they are built.

    Args:
        folder: where such folders are.
        key: the settings that decide on the indices, as JSON can say them.
        prefixes: the datasets; the main rank reads their .idx files.
    """
    chosen: list[tuple[Path, Path] | None] = [None]
    if mesh.is_main:
        whole = folder / _digest(key, prefixes)
        remove_leftovers(whole)
        chosen = [(whole, whole if whole.exists() else aside_of(whole))]
    dist.broadcast_object_list(chosen, src=0, device=mesh.device.torch)
    assert chosen[0] is not None
    whole, place = chosen[0]
    yield place
    mesh.barrier()  # every rank has opened the files, and those stay open when the folder is renamed
    if mesh.is_main and place != whole:
        with contextlib.suppress(OSError):  # another run of the same data was faster
            place.replace(whole)


def _digest(key: object, prefixes: Sequence[Path]) -> str:
    hasher = hashlib.sha256(json.dumps(key).encode())
    for prefix in prefixes:
        with index_path(prefix).open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:24]
