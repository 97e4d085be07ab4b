"""Check the lines of a sweep and print what scripts/sweep.sh starts: a line a run, quoted for a shell.

    python tools/plan_sweep.py CONFIG FILE

See scripts/sweep.sh --help for what FILE holds. Every line that is wrong is named, with its number; exit status 2.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import load_config
from megatron_ee.errors import UserError


def plan_sweep(config: str, path: Path) -> list[list[str]]:
    """The overrides of each run, its name first.

    Raises:
        UserError: lines are wrong or there are none; one line of text for each fault.
    """
    runs: list[list[str]] = []
    line_of: dict[Path, int] = {}
    faults: list[str] = []
    for number, line in _lines(path):
        try:
            overrides = shlex.split(line)
            resolved = load_config(config, overrides, read_model=read_model)
            name = resolved.name if _gives_name(overrides) else f"{resolved.name}-{number}"
            folder = Path(resolved.runs) / name
            if folder in line_of:
                raise UserError(f"{folder} is the folder of line {line_of[folder]} already; give one of them a name=")
        except ValueError as error:  # shlex's: a quote that does not end
            faults += [f"{path}:{number}: {fault}" for fault in str(error).splitlines()]
            continue
        line_of[folder] = number
        runs.append([f"name={name}", *(override for override in overrides if not _gives_name([override]))])
    if not runs and not faults:
        faults = [f"{path}: no line with a run"]
    if faults:
        raise UserError("\n".join(faults))
    return runs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Those that hold a run, with their numbers."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _gives_name(overrides: list[str]) -> bool:
    return any(override.partition("=")[0].strip() == "name" for override in overrides)


def main() -> int:
    """Returns the exit status: 2 when something has to be changed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of all runs")
    parser.add_argument("file", metavar="FILE", type=Path, help="the overrides of one run in each line")
    arguments = parser.parse_args()
    try:
        runs = plan_sweep(arguments.config, arguments.file)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for run in runs:
        print(shlex.join(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
