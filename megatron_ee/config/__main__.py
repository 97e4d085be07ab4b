"""`python -m megatron_ee.config FILE [key.path=value ...]`: print the resolved config, or explain what is wrong."""

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.config.errors import ConfigError
from megatron_ee.config.loader import load_config, to_yaml
from megatron_ee.config.schema import Config


def main() -> int:
    """Returns the exit status: 2 when the config is wrong."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ee.config", description="print a resolved config")
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--schema", nargs="?", const="-", metavar="FILE", help="write the JSON schema instead")
    arguments = parser.parse_args()
    if (arguments.config is None) == (arguments.schema is None):
        parser.error("give either a config file or --schema")
    try:
        text = _schema() if arguments.config is None else to_yaml(load_config(arguments.config, arguments.overrides))
        if arguments.schema in (None, "-"):
            sys.stdout.write(text)
        else:
            Path(arguments.schema).write_text(text, encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _schema() -> str:
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
