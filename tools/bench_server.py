"""What a server adds to its model, and what a client with slowdown prompts costs others. Writes runs/bench/server.json.

The server is a process of its own, on one core; its clients, and the model beside it, are another. What is compared
takes turns: a ratio is the median over rounds, and A/A of the same rounds, beside it as `aa`, says how much is noise.
"""

import argparse
import sys
from pathlib import Path

from bench_decode import find
from bench_report import Measure, table, write
from bench_train import check

from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/bench/checkpoint"), help="default: of `make bench-checkpoint`"
    )
    parser.add_argument("--small", action="store_true", help="few requests and rounds: seconds, and no figures")
    parser.add_argument("--only", choices=["speed", "slowdown"], help="one half of it")
    parser.add_argument("--threshold", type=float, default=0.4, metavar="C", help="of the exits (default: 0.4)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/server.json"), metavar="FILE")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        check(arguments.output)
        measures = run(find(arguments.checkpoint), arguments.only, arguments.threshold, small=arguments.small)
        write(measures, arguments.output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(measures))
    print(f"written to {arguments.output}")
    return 0


def run(checkpoint: Path, only: str | None, threshold: float, *, small: bool) -> list[Measure]:
    """Both halves, or one, beside one server."""
    from bench_server_rounds import Bench, slowdown_measures, speed_measures
    from bench_server_setup import SMALL, Sizes, served

    sizes = SMALL if small else Sizes()
    measures: list[Measure] = []
    with served(checkpoint, sizes, threshold) as server:
        bench = Bench(checkpoint, server, sizes, threshold)
        if only != "slowdown":
            measures += speed_measures(bench)
        if only != "speed":
            measures += slowdown_measures(bench)
    return measures


if __name__ == "__main__":
    sys.exit(main())
