"""Each start of a run leaves a folder of its own: RUN/attempts/3/, with the config, the environment and the outcome."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPLETE, REFUSED, STOPPED = 0, 2, 75
"""Exit statuses: the run is at its end; the user has to change something; it saved before its end and wants to be
started again (EX_TEMPFAIL of sysexits.h)."""

_OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run, counted from 1."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def end(self, status: int, reason: str, *, iteration: int) -> None:
        """Leave the outcome, whole or not at all.

        Args:
            iteration: how many the run has done.
        """
        aside = self.folder / f".{_OUTCOME}"
        content = {"exit_status": status, "reason": reason, "iteration": iteration, "time": _now()}
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(self.folder / _OUTCOME)


def open_attempt(run_folder: Path, *, config: str, environment: dict[str, Any]) -> Attempt:
    """The folder of this start, after those of earlier ones. One process of a run does it.

    Raises:
        OSError: it cannot be written.
    """
    attempt = Attempt(run_folder / "attempts" / str(_newest(run_folder) + 1))
    attempt.folder.mkdir(parents=True)
    (attempt.folder / "config.yaml").write_text(config)
    about = {"started": _now(), "process": os.getpid(), **environment}
    (attempt.folder / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    return attempt


def _newest(run_folder: Path) -> int:
    return max((int(path.name) for path in (run_folder / "attempts").glob("*") if path.name.isdecimal()), default=0)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
