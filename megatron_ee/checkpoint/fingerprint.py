"""Which Hugging Face folder it is that a run began with, without reading all of it."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_ee.errors import UserError

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 12


def fingerprint(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as a description's `files`: of what says which model it is, and of samples of its numbers.

    Of config.json, exits.json and the index it is over all bytes. Of a .safetensors file it is over its size, its first
    256 KiB (header, or the header's beginning) and 64 pieces of 4 KiB, evenly spread: enough to know a fine-tuned model
    from its base, in a moment for any size, and not enough to find a single changed number.

    Raises:
        UserError: a file cannot be read.
    """
    whole = ["config.json", "exits.json", "model.safetensors.index.json"]
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
        digests = {name: _digest([(folder / name).read_bytes()]) for name in whole if (folder / name).is_file()}
        return digests | {name: _digest(_samples(folder / name)) for name in names}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _samples(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield f"{size}\n".encode()
        yield file.read(_SAMPLES * _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
