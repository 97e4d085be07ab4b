"""metrics.jsonl, the record of a run: one object a line, each iteration once, in order."""

import json
import logging
import os
from pathlib import Path

from megatron_ee.training.loggers.interface import Figures

_LOG = logging.getLogger("megatron_ee")


class JsonLines:
    """Appends a line per call.

    Lines are handed to the operating system one by one, so a killed process loses none; they are not forced to the
    disk: what a power failure costs here, the checkpoint that the run goes back to has to repeat anyway. What a full
    disk doesn't take is kept, about a kilobyte a line, and goes first the next time.

    Args:
        start: iterations that the run has done. Lines beyond it are of a part that was lost; they are set aside.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _set_lost_lines_aside(path, start)
        path.open("ab").close()
        self._path, self._unwritten, self._is_failing = path, b"", False

    def log(self, iteration: int, figures: Figures) -> None:
        self._unwritten += json.dumps({"iteration": iteration, **figures}).encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._write()
        if self._unwritten:
            num_lines = self._unwritten.count(b"\n")
            _LOG.error("%s: the last %d lines are lost; they could not be written", self._path, num_lines)

    def _write(self) -> None:
        """As much as the disk takes, be it a part of a line: the rest continues it."""
        try:
            if self._unwritten:
                with self._path.open("ab", buffering=0) as file:
                    while self._unwritten:
                        self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            if not self._is_failing:
                _LOG.error("%s cannot be written: %s; its lines are kept until it can be", self._path, error.strerror)
            self._is_failing = True
        else:
            self._is_failing = False


def _set_lost_lines_aside(path: Path, start: int) -> None:
    """Leave in `path` the whole lines up to iteration `start`, in one step.

    The others go to `<name>.lost`: they are the only trace of how a run fared before it went down. A torn last line
    goes with them. Killed between the two writes, the next start does both again.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _is_record(line, start)]
    lost = [line for line in lines if not _is_record(line, start)]
    if not lost:
        return
    lost_path = path.with_name(f"{path.name}.lost")
    with lost_path.open("ab") as file:
        file.writelines(line.rstrip(b"\n") + b"\n" for line in lost)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(b"".join(kept))
    aside.replace(path)
    _LOG.info("%s: %d lines beyond iteration %d set aside in %s", path.name, len(lost), start, lost_path.name)


def _is_record(line: bytes, start: int) -> bool:
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, TypeError, KeyError):
        return False
    return line.endswith(b"\n") and isinstance(iteration, int) and iteration <= start
