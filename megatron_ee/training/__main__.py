"""Train an early-exit model on this rank: CONFIG [key.path=value ...]; scripts/train.sh starts all ranks."""

import argparse
import os
import sys

from megatron_ee.config import open_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies
from megatron_ee.parallel.world import check_world


def main() -> int:
    """Returns the exit status: 2 when the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        with open_config(arguments.config, arguments.overrides) as config:
            check_world(config, int(os.environ.get("WORLD_SIZE", "1")))  # torchrun's, like the ranks below
            device = choose_device(config.device)
            from megatron_ee.training.build import build_trainer  # imports megatron-core, which needs a chosen device

            trainer = build_trainer(config, device)
            trainer.train()
            trainer.close()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
