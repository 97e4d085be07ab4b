"""What exits cost in training, and what training costs beside other ways to do it. Writes runs/bench/train.json.

Whatever is compared takes turns in one run: a round is (A, B, A). A ratio is the median over rounds, and A/A of the
same rounds, beside it as `aa`, says how much of it is noise.
"""

import argparse
import sys
from pathlib import Path

from bench_report import Measure, table, write

from megatron_ee.errors import FieldError, UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models and few rounds: seconds, and no figures")
    parser.add_argument("--only", choices=["pipeline", "model"], help="one half of it")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/train.json"), metavar="FILE")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        check(arguments.output)
        measures = run(arguments.only, small=arguments.small)
        write(measures, arguments.output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(measures))
    print(f"written to {arguments.output}")
    return 0


def check(output: Path) -> None:
    """
    Raises:
        FieldError: the output cannot be written; better said before minutes of work.
    """
    if output.is_dir():
        raise FieldError("--output", f"{output} is a folder, not a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FieldError("--output", f"{output} cannot be written: {error.strerror}") from error


def run(only: str | None, *, small: bool) -> list[Measure]:
    """Both halves, or one."""
    measures: list[Measure] = []
    if only != "model":
        from bench_train_pipeline import SMALL, PipelineSizes, pipeline_measures

        measures += pipeline_measures(SMALL if small else PipelineSizes())
    if only != "pipeline":
        from bench_train_model import model_measures

        measures += model_measures(small)
    return measures


if __name__ == "__main__":
    sys.exit(main())
