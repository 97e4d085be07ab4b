"""Whether a checkpoint is what was saved: its files against the checksum of each, which its description holds."""

import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_ee.checkpoint.checksum import checksum_of_file
from megatron_ee.checkpoint.description import Description, read_description
from megatron_ee.checkpoint.folders import SHARD_SUFFIX, CheckpointError, DamagedError
from megatron_ee.parallel.mesh import Mesh

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
_NUM_THREADS = 4
_CHANGED = "is not what was saved"

Reads = Literal["all", "all but shards", "nothing"]


def verify(folder: Path, mesh: Mesh, *, reads: Reads) -> Description:
    """The description of a checkpoint without damage. Collective: ranks share the files, and agree.

    Args:
        reads: what is read, and compared with its checksum, beside the description: all files; all but those of shards,
            which are many times larger, for `load_verified`; or nothing.

    Raises:
        DamagedError: a file is missing, incomplete or changed; it names the first.
        CheckpointError: the checkpoint is of another format version, or its files cannot be read.
    """
    description = mesh.from_main(lambda: read_description(folder))
    if reads != "nothing":
        _verify(folder, mesh, description, lambda name: reads == "all" or not _is_shard(name))
    return description


def verify_shards(folder: Path, mesh: Mesh, *, known: Mapping[str, str] | None = None) -> None:
    """Compare the files of shards with their checksums. Collective.

    Args:
        known: checksums of files that this rank has read already; each file is left to others where one rank has.

    Raises:
        DamagedError, CheckpointError: see `verify`.
    """
    known = known or {}
    description = mesh.from_main(lambda: read_description(folder))
    changed = sorted(name for name in known if known[name] != description.files.get(name))
    _raise_first(DamagedError(_message(folder, changed[0], _CHANGED)) if changed else None, mesh)
    read: list[list[str]] = [[] for _ in range(mesh.world_size)]
    dist.all_gather_object(read, list(known))
    of_any = {name for names in read for name in names}
    _verify(folder, mesh, description, lambda name: _is_shard(name) and name not in of_any)


def damage_of(path: Path, checksum: str) -> str:
    """What is wrong with a file of a checkpoint; empty for nothing.

    Raises:
        CheckpointError: it cannot be read, for a reason that says nothing of what is in it.
    """
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            found = checksum_of_file(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if error.errno in _DAMAGE:
            return f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return "" if found == checksum else _CHANGED


def _verify(folder: Path, mesh: Mesh, description: Description, is_meant: Callable[[str], bool]) -> None:
    share = sorted(filter(is_meant, description.files))[mesh.rank :: mesh.world_size]
    _raise_first(_first_problem(folder, {name: description.files[name] for name in share}), mesh)


def _raise_first(problem: CheckpointError | None, mesh: Mesh) -> None:
    """The problem of the first rank that has one, on all ranks."""
    answers: list[CheckpointError | None] = [None] * mesh.world_size
    dist.all_gather_object(answers, problem)
    for answer in answers:
        if answer is not None:
            raise answer


def _first_problem(folder: Path, files: Mapping[str, str]) -> CheckpointError | None:
    def check(name: str) -> str:
        return damage_of(folder / name, files[name])

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            damage = zip(files, pool.map(check, files), strict=True)
            return next((DamagedError(_message(folder, name, what)) for name, what in damage if what), None)
        except CheckpointError as error:
            return error


def _message(folder: Path, name: str, damage: str) -> str:
    return f"{folder} is damaged: {name} {damage}"


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIX)
