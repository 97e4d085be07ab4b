"""One start of a run at a time: two would write into the same files, each of them what the other doesn't expect."""

import errno
import fcntl
import logging
import os
import platform
import time
from pathlib import Path
from typing import IO

from megatron_ee.errors import FieldError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_S = 0.2


class RunLock:
    """Held by one process of a run until it ends, however it ends; the system lets go of it.

    Args:
        patience: seconds to wait for a holder, which may be about to end: it was told to, or its machine is lost.
    """

    def __init__(self, run_folder: Path, *, patience: float = 30.0) -> None:
        self._path, self._patience = run_folder / ".lock", patience
        self._file: IO[str] | None = None

    def take_if_begun(self) -> None:
        """Before a run's files are read; a run that has none yet has no folder either.

        Raises:
            FieldError: see `take`.
        """
        if self._path.parent.exists():
            self.take()

    def take(self) -> None:
        """Make the run's folder, if need be, and the run this process's; once more is nothing.

        Raises:
            FieldError: another process trains this run, or the folder cannot be written.
        """
        if self._file is not None:
            return
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Of the process, not of the open file: locks of that kind work on most network file systems too.
            self._wait(self._path.open("a+"))
        except OSError as error:
            raise FieldError("runs", f"{folder} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Let another one train the run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self, file: IO[str]) -> None:
        deadline = time.monotonic() + self._patience
        while not self._try(file):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise FieldError("name", f"{self._path.parent} is being trained already, by {holder}")
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._file = file

    def _try(self, file: IO[str]) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return False
            logging.getLogger("megatron_ee").warning(
                "%s: this file system has no locks (%s); take care not to train a run twice at a time",
                self._path.parent,
                error.strerror,
            )
        return True
