"""What files cost: checkpoints beside the bare disk, data beside a step, a start. Writes runs/bench/io.json.

Whatever is compared takes turns in one run: a round is (A, B, A). A ratio is the median over rounds, and A/A of the
same rounds, beside it as `aa`, says how much of it is noise.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench_report import Measure, table, write
from bench_train import check

from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few rounds: seconds, and no figures")
    parser.add_argument("--only", choices=["checkpoint", "start"], help="one half of it")
    parser.add_argument("--folder", type=Path, help="on the disk to measure, with 4 GB of room (default: the output's)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/io.json"), metavar="FILE")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        check(arguments.output)
        with tempfile.TemporaryDirectory(prefix="io-", dir=arguments.folder or arguments.output.parent) as folder:
            measures = run(Path(folder), arguments.only, small=arguments.small)
        write(measures, arguments.output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(measures))
    print(f"written to {arguments.output}")
    return 0


def run(folder: Path, only: str | None, *, small: bool) -> list[Measure]:
    """Both halves, or one."""
    measures: list[Measure] = []
    if only != "start":
        from bench_io_checkpoint import checkpoint_measures

        measures += checkpoint_measures(folder, small=small)
    if only != "checkpoint":
        from bench_io_start import start_measures

        measures += start_measures(folder, small=small)
    return measures


if __name__ == "__main__":
    sys.exit(main())
