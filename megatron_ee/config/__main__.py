"""Look at a config without running it: python -m megatron_ee.config FILE [key.path=value ...]

Prints the resolved config, or explains what is wrong (exit status 2). With --world-size it is checked for so many
processes; with --estimate, what each rank would hold is printed instead.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, ParallelConfig, open_config, to_yaml
from megatron_ee.config.checks import BUILT_IN
from megatron_ee.errors import FieldError, UserError
from megatron_ee.model.vocabulary import planned_vocab_size
from megatron_ee.parallel.estimate import describe, estimate
from megatron_ee.parallel.world import check_world


def main() -> int:
    """Returns the exit status: 2 when the config is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ee.config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--world-size", type=_positive, metavar="N", help="check it for N processes")
    parser.add_argument("--estimate", action="store_true", help="print parameters, memory and placement")
    parser.add_argument("--schema", nargs="?", const="-", metavar="FILE", help="write the JSON schema instead")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) == (arguments.schema is None):
        parser.error("give either a config file or --schema")
    try:
        if arguments.config is None:
            _write(_schema(), arguments.schema)
        else:
            with open_config(arguments.config, arguments.overrides, read_model=read_model) as config:
                sys.stdout.write(_look_at(config, arguments.world_size, wants_estimate=arguments.estimate))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _look_at(config: Config, world_size: int | None, *, wants_estimate: bool) -> str:
    if world_size is not None:
        check_world(config, world_size)
    if not wants_estimate:
        return to_yaml(config)
    _check_schedule(config.parallel.schedule)
    estimated = estimate(config, world_size or _fewest_processes(config.parallel), planned_vocab_size(config))
    return describe(estimated)


def _check_schedule(schedule: str) -> None:
    """What a plug-in's schedule keeps in memory is known to it alone, and looking at a config runs no plug-in."""
    built_in = BUILT_IN["parallel.schedule"]
    if schedule not in built_in:
        raise FieldError("parallel.schedule", f"--estimate knows {', '.join(built_in)}, not the plug-in's {schedule!r}")


def _fewest_processes(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * (1 if parallel.data == "auto" else parallel.data)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def _write(text: str, path: str) -> None:
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def _schema() -> str:
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
