"""Look at a config without running it: python -m megatron_ee.config FILE [key.path=value ...]

Prints the resolved config, or explains what is wrong (exit status 2). With --world-size it is checked for so many
processes; with --estimate, what each rank would hold is printed instead.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.config import Config, load_config, to_yaml
from megatron_ee.errors import UserError
from megatron_ee.model.vocabulary import resolve_vocab_size
from megatron_ee.parallel.estimate import describe, estimate
from megatron_ee.parallel.world import count_microbatches, data_parallel_size
from megatron_ee.tokenizer import open_tokenizer


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
    arguments = parser.parse_args()
    if (arguments.config is None) == (arguments.schema is None):
        parser.error("give either a config file or --schema")
    try:
        if arguments.config is None:
            _write(_schema(), arguments.schema)
        else:
            config = load_config(arguments.config, arguments.overrides)
            sys.stdout.write(_look_at(config, arguments.world_size, wants_estimate=arguments.estimate))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _look_at(config: Config, world_size: int | None, *, wants_estimate: bool) -> str:
    if world_size is not None:
        data_size = data_parallel_size(config.parallel, world_size)
        count_microbatches(config.training.global_batch_size, config.training.micro_batch_size, data_size)
    if not wants_estimate:
        return to_yaml(config)
    vocab_size = resolve_vocab_size(config.model, open_tokenizer(config.data.tokenizer))
    fewest = config.parallel.pipeline * (1 if config.parallel.data == "auto" else config.parallel.data)
    return describe(estimate(config, world_size or fewest, vocab_size), config.model.num_layers)


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
