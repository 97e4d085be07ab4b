"""Whether a checkpoint is what was saved: its files against the SHA-256 of each, which its description holds."""

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from megatron_ee.checkpoint.description import Description, read_description
from megatron_ee.checkpoint.folders import CheckpointError, DamagedError
from megatron_ee.parallel.mesh import Mesh

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
_NUM_THREADS = 4


def verify(folder: Path, mesh: Mesh, *, reads_all: bool) -> Description:
    """The description of a checkpoint without damage. Collective: ranks share the files, and agree.

    Args:
        reads_all: whether all files are read and hashed, or only the description.

    Raises:
        DamagedError: a file is missing, incomplete or changed; it names the first.
        CheckpointError: the checkpoint is of another format version, or its files cannot be read.
    """
    description = mesh.from_main(lambda: read_description(folder))
    if not reads_all:
        return description
    share = sorted(description.files)[mesh.rank :: mesh.world_size]
    answers: list[CheckpointError | None] = [None] * mesh.world_size
    dist.all_gather_object(answers, _first_problem(folder, {name: description.files[name] for name in share}))
    for problem in answers:
        if problem is not None:
            raise problem
    return description


def damage_of(path: Path, digest: str) -> str:
    """What is wrong with a file of a checkpoint; empty for nothing.

    Raises:
        CheckpointError: it cannot be read, for a reason that says nothing of what is in it.
    """
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # hashing need not wait for the disk
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if error.errno in _DAMAGE:
            return f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return "" if found == digest else "is not what was saved"


def _first_problem(folder: Path, files: Mapping[str, str]) -> CheckpointError | None:
    def check(name: str) -> str:
        return damage_of(folder / name, files[name])

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        try:
            return _damage(folder, zip(files, pool.map(check, files), strict=True))
        except CheckpointError as error:
            return error


def _damage(folder: Path, found: Iterable[tuple[str, str]]) -> DamagedError | None:
    return next((DamagedError(f"{folder} is damaged: {name} {damage}") for name, damage in found if damage), None)
