"""Work for processes of their own that notes when it began and ended."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def nothing() -> None:
    """What a process does first."""


class Noting:
    """A line at the beginning and the end of each run."""

    def __init__(self, path: Path, failing: tuple[str, ...], seconds: float = 0.2) -> None:
        self._path, self._failing, self._seconds = path, failing, seconds

    def __call__(self, run: Any) -> str:
        self._note(f"{run.name}:begin")
        if run.name in self._failing:
            from reproduce_runs import FailedError  # of tools/, which the tests' process has found

            raise FailedError("no room")
        time.sleep(self._seconds)
        self._note(f"{run.name}:end")
        return str(run.name).upper()

    def _note(self, line: str) -> None:
        file = os.open(self._path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(file, f"{line}\n".encode())
        os.close(file)


def when(path: Path, line: str, act: Callable[[], object], timeout: float = 60.0) -> None:
    """In a thread: act once the line has been noted."""

    def watch() -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if path.exists() and line in path.read_text():
                act()
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
