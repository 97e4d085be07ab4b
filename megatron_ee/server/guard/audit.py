"""What was refused, and by whom it was asked: a line of JSON each. Never a prompt's text, and never a key."""

import json
import os
import time
from pathlib import Path

from megatron_ee.errors import FieldError


class AuditLog:
    """
    Args:
        path: None: nothing is written.

    Raises:
        FieldError: it cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._file: int | None = None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise FieldError("serving.audit", f"{path}: {error.strerror}") from error

    def note(self, event: str, *, client: str, request: str, **figures: object) -> None:
        if self._file is not None:
            line = {"time": time.time(), "event": event, "client": client, "request": request, **figures}
            os.write(self._file, (json.dumps(line) + "\n").encode())
