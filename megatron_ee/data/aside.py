"""Writing aside: files get their own names when they are whole, and what a killed process leaves is nobody's data."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

_SUFFIX = ".tmp"


def aside_of(target: Path) -> Path:
    """A name beside `target` that is this process's alone, also on a file system of several machines."""
    return target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}{_SUFFIX}")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A path, or prefix of paths, to write under; whatever still lies there at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    aside = aside_of(target)
    try:
        yield aside
    finally:
        _remove_all(aside)


def remove_leftovers(target: Path) -> None:
    """Remove what processes of this machine left aside when they were killed."""
    own = f"{target.name}.{socket.gethostname()}."
    for path in target.parent.glob(f"{escape(own)}*{_SUFFIX}*"):
        pid = path.name.removeprefix(own).split(".")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            _remove(path)


def _remove_all(aside: Path) -> None:
    for path in aside.parent.glob(f"{escape(aside.name)}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True
