"""Train an early-exit model on this rank: pretrain_ee.py CONFIG [key.path=value ...]; scripts/train.sh starts all."""

import argparse
import os
import sys

from megatron_ee.config import load_config
from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        config = load_config(arguments.config, arguments.overrides)
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
