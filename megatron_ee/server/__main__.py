"""Serve a model: python -m megatron_ee.server [configs/serve/demo.yaml] [--model FOLDER] [serving.port=8000 ...]

Clients of OpenAI's interface are served at /v1, people at /. The config says how, where it says nothing the model's own
does. Under torchrun the processes hold the model together, and the first one listens. SIGTERM and Ctrl-C end the server
once all answers under way have ended; a second Ctrl-C does at once.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ee.errors import StageLostError, UserError
from megatron_ee.exit_status import is_first_of_node, leave_status
from megatron_ee.log import quiet_dependencies, start_logging
from megatron_ee.server.settings import open_serving_config

_MODEL = "a run folder (its newest checkpoint), a step folder or a Hugging Face folder; instead of serving.model"


def main() -> int:
    status = _run(_parse())
    leave_status(status)
    if status and os.environ.get("WORLD_SIZE", "1") != "1":  # others may be gone, and gloo would wait for them
        sys.stdout.flush()
        os._exit(status)
    return status


def _run(arguments: argparse.Namespace) -> int:
    settings = list(arguments.settings)
    file = Path(settings.pop(0)) if settings and "=" not in settings[0] else None
    quiet_dependencies()
    try:
        with open_serving_config(file, settings, model=arguments.model) as (folder, config):
            if arguments.stages:
                print(config.inference.parallel.pipeline)
                return 0
            start_logging(is_main_rank=os.environ.get("RANK", "0") == "0")
            from megatron_ee.server.serving import serve  # imports torch

            serve(folder, config)
    except StageLostError as error:
        print(error, file=sys.stderr)
        return 2
    except UserError as error:
        if is_first_of_node():
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=_MODEL)
    parser.add_argument("--stages", action="store_true", help="print the number of stages, and do no more")
    parser.add_argument("settings", nargs="*", metavar="[CONFIG] key.path=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
