"""Train an early-exit model on this rank: CONFIG [key.path=value ...]; scripts/train.sh starts all ranks."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import open_config
from megatron_ee.errors import UserError
from megatron_ee.exit_status import is_first_of_node, leave_status
from megatron_ee.log import quiet_dependencies
from megatron_ee.parallel.world import check_world
from megatron_ee.training.operations.attempts import COMPLETE, REFUSED, STOPPED
from megatron_ee.training.operations.stopping import StopRequests, end_with

if TYPE_CHECKING:
    from megatron_ee.training.trainer import Trainer


def main() -> int:
    """Returns the exit status: 2 when the user has to change something, 75 when the run wants to be started again.

    Under torchrun that one is 0, because torchrun takes any other for a failure, and ends with 1 itself whatever its
    ranks have ended with. What they have is left in the file that the variable EXIT_STATUS_FILE names, if it does;
    scripts/train.sh goes by that.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    stop_requests = StopRequests()
    stop_requests.listen()
    if _is_under_torchrun():
        end_with(parent=os.getppid())
        stop_requests.end_with_siblings()
    try:
        with open_config(arguments.config, arguments.overrides, read_model=read_model) as config:
            check_world(config, int(os.environ.get("WORLD_SIZE", "1")))  # torchrun's, like the ranks below
            stop_requests.exit_duration = config.training.exit_duration
            quiet_dependencies()
            from megatron_ee.device import choose_device  # imports torch, for seconds: who wants to stop it is heard

            device = choose_device(config.device)
            from megatron_ee.training.build import build_trainer  # imports megatron-core, which needs a chosen device

            status = train(build_trainer(config, device, stop_requests))
    except UserError as error:
        if is_first_of_node():
            print(error, file=sys.stderr)
        status = REFUSED
    stop_requests.ignore()
    leave_status(status)
    return COMPLETE if status == STOPPED and _is_under_torchrun() else status


def _is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def train(trainer: "Trainer") -> int:
    """Run it, watched over, and leave the outcome; returns the exit status that it asks for."""
    with trainer.watched():
        try:
            reason = trainer.train()
        except UserError as error:
            trainer.end(REFUSED, str(error))
            raise
        status = STOPPED if reason else COMPLETE
        trainer.end(status, reason or "complete")
        trainer.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
