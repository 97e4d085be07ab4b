"""Each start of a run leaves a folder of its own: RUN/attempts/3/, with the config, the environment and the outcome.

    python -m megatron_ee.training.operations.attempts RUN

prints the number of the newest (0: none) and the exit status that its outcome asks for (-: it has not ended, or was
killed). scripts/train.sh goes by it: torchrun ends with 1 after any signal, whatever its ranks had to say.
"""

import argparse
import json
import os
import sys
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


def newest_outcome(run_folder: Path) -> tuple[int, int | None]:
    """The newest attempt's number (0: none), and its exit status if it has ended by itself."""
    number = _newest(run_folder)
    try:
        status = json.loads((run_folder / "attempts" / str(number) / _OUTCOME).read_text())["exit_status"]
    except FileNotFoundError:
        return number, None
    return number, int(status)


def _newest(run_folder: Path) -> int:
    return max((int(path.name) for path in (run_folder / "attempts").glob("*") if path.name.isdecimal()), default=0)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def main() -> int:
    """Print the newest attempt of a run's folder."""
    parser = argparse.ArgumentParser(description="Print a run's newest attempt, and the exit status it asks for.")
    parser.add_argument("run", type=Path, help="the run's folder")
    number, status = newest_outcome(parser.parse_args().run)
    print(number, "-" if status is None else status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
