"""heartbeat.json: that a run is alive, and what it is at, for whoever looks after it from outside."""

import json
import logging
import os
import platform
import time
from pathlib import Path

from megatron_ee.training.operations.whereabouts import Whereabouts


class Heartbeat:
    """Writes the file again every `interval` seconds, whole each time. One process of a run does it.

    Args:
        attempt: the number of this start of the run.
    """

    def __init__(self, run_folder: Path, *, interval: float, attempt: int) -> None:
        self._path, self._interval, self._attempt = run_folder / "heartbeat.json", interval, attempt
        self._next, self._is_failing = 0.0, False

    def beat(self, whereabouts: Whereabouts) -> None:
        """Called often; writes when it is time. Where it cannot, it says so once, and goes on trying."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval
        seen = whereabouts.see()
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "unix_time": round(time.time(), 3),
            "attempt": self._attempt,
            "host": platform.node(),
            "process": os.getpid(),
            "iteration": seen.iteration,
            "phase": seen.phase,
            "action": seen.action and str(seen.action),
            "seconds": round(now - seen.since, 3),
        }
        aside = self._path.with_name(f".{self._path.name}")
        try:
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.replace(self._path)
        except OSError as error:
            if not self._is_failing:
                logging.getLogger("megatron_ee").error("the heartbeat cannot be written: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False
