"""The checksum of a checkpoint's files: XXH3, of 128 bits, at the speed of memory. It is there to find damage: whoever
could forge a file could forge what the description says of it, so that a cryptographic hash would guard no better."""

import hashlib
from typing import BinaryIO

from xxhash import xxh3_128

Checksum = xxh3_128
"""As in hashlib: `update`, `hexdigest`."""


def checksum_of(content: bytes) -> str:
    """In hexadecimal."""
    digest: str = xxh3_128(content).hexdigest()
    return digest


def checksum_of_file(file: BinaryIO) -> str:
    """In hexadecimal, of what is left to read of it."""
    return hashlib.file_digest(file, xxh3_128).hexdigest()  # type: ignore[arg-type]
