"""A file that notes who was refused what: a line of JSON for each event, never a prompt, a text or a key.

The file is made for its owner alone. Whoever rotates it may move it away: the next line goes to a new one.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_ee.errors import FieldError

Figure = str | int | float | bool | None

_LONGEST = 200


class AuditLog:
    """
    Args:
        path: None: nothing is noted.
        clock: seconds since 1970.

    Attributes:
        lost: events that could not be written, since the file was opened.

    Raises:
        FieldError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = None if path is None else Path(path), clock
        self._file: IO[str] | None = None
        self.lost = 0
        if self._path is not None:
            try:
                self._file = _open(self._path)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise FieldError("serving.audit", f"{self._path} cannot be written: {reason}") from None

    def note(self, event: str, *, client: str, request: str, **figures: Figure) -> None:
        """One line. What is too long is cut; what JSON has no number for (NaN, infinity) is a string.

        A line that cannot be written is counted, and said in the log once in a row.
        """
        if self._path is None:
            return
        assert "time" not in figures
        values: dict[str, Figure] = {"event": event, "request": request, "client": client, **figures}
        line = json.dumps({"time": round(self._clock(), 3)} | {name: _tame(value) for name, value in values.items()})
        try:
            self._write(line)
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        """Nothing is noted after it."""
        file, self._file, self._path = self._file, None, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._lose(error)

    def _write(self, line: str) -> None:
        assert self._path is not None
        if self._file is None or not _is_at(self._file, self._path):
            old, self._file = self._file, None
            if old is not None:
                old.close()
            self._file = _open(self._path)
        self._file.write(line + "\n")

    def _lose(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what it could not write before, it cannot now
                file.close()
        if not self.lost:
            logging.getLogger("megatron_ee").warning("serving.audit: events are lost: %s", error.strerror)
        self.lost += 1


def _open(path: Path) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "a", buffering=1, encoding="ascii")


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(file.fileno()))


def _tame(value: Figure) -> Figure:
    if isinstance(value, str) and len(value) > _LONGEST:
        return value[: _LONGEST - 3] + "..."
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return value
