"""A disk of a few megabytes, for tests of what happens when it is full or cannot be written."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PAGE = 4096


class SmallDisk:
    """A file system in memory, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave no room for anything."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (2**20, _PAGE):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def free(self) -> None:
        """Take back what `fill` took."""
        self._filler.unlink()

    def allow_writing(self, *, allowed: bool) -> None:
        """As after an error of the disk; no file may be open for writing."""
        _mount("-o", "remount,rw" if allowed else "remount,ro", str(self.path))


@contextmanager
def small_disk(folder: Path, *, megabytes: float) -> Iterator[SmallDisk]:
    """One of that size, in a new folder; skips the test where nothing may be mounted."""
    path = folder / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    try:
        _mount("-t", "tmpfs", "-o", f"size={int(megabytes * 2**20)}", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
