"""Make one model of exits that were trained alone and the model that they were trained on: merge_exits.py TUNED DEST

TUNED is the run of training.trains: exits, or a step folder of it. DEST, which must not exist, becomes a run folder: it
can be decoded and evaluated, and other runs can begin with it (checkpoint.initial). The model's own parameters stay as
they are, bit for bit. What they were trained on may be a Hugging Face folder.
"""

import argparse
import sys
from pathlib import Path

from megatron_ee.device import choose_device
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    """Returns the exit status: 2 when the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="a run folder (its newest) or a step folder")
    parser.add_argument("destination", type=Path, metavar="DEST", help="the run folder to write")
    parser.add_argument("--initial", type=Path, help="the folder of the model, where it has moved")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        device = choose_device("cpu")
        from megatron_ee.checkpoint.merge import merge_exits  # imports megatron-core, which needs a chosen device

        merged = merge_exits(arguments.tuned, arguments.destination, device, initial=arguments.initial)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"model: {merged.initial}{_exits(merged.kept_exits)}")
    print(f"tuned: {merged.tuned}{_exits(merged.tuned_exits)}")
    print(merged.folder)
    return 0


def _exits(layers: tuple[int, ...]) -> str:
    return f", exits {', '.join(map(str, layers))}" if layers else ""


if __name__ == "__main__":
    sys.exit(main())
