"""How fast a model is decoded, at full depth, with exits and with drafts. Writes runs/bench/decode.json.

Full depth is held against Hugging Face's `generate` of the same model, exits against the model's own full depth and
against the least time that their depths need, self-speculation against both of these and against Hugging Face's own.
Whatever is compared takes turns in one process, on one core; a ratio is the median over rounds, and A/A of the same
rounds, beside it as `aa`, says how much of it is noise.
"""

import argparse
import sys
from pathlib import Path

from bench_report import Measure, table, write
from bench_train import check

from megatron_ee.checkpoint.folders import CheckpointError, find_checkpoint
from megatron_ee.errors import UserError
from megatron_ee.log import quiet_dependencies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/bench/checkpoint"), help="default: of `make bench-checkpoint`"
    )
    parser.add_argument("--small", action="store_true", help="few tokens and rounds: seconds, and no figures")
    parser.add_argument("--only", choices=["full", "exits", "speculation"], help="one part of it")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/decode.json"), metavar="FILE")
    arguments = parser.parse_args()
    quiet_dependencies()
    try:
        check(arguments.output)
        measures = run(find(arguments.checkpoint), arguments.only, small=arguments.small)
        write(measures, arguments.output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written to {arguments.output}")
    return 0


def find(checkpoint: Path) -> Path:
    """One step folder for all: a run that is still trained may have another newest one in a minute.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return find_checkpoint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; `make bench-checkpoint` trains the one that this bench is for") from error


def run(checkpoint: Path, only: str | None, *, small: bool) -> list[Measure]:
    """All parts, or one, each printed when it is there."""
    from bench_decode_exits import exit_cells, exit_table
    from bench_decode_full import exported, full_depth_measures
    from bench_decode_setup import Prompts, opened, small_suite, suite
    from bench_decode_speculation import speculation_cells, speculation_table

    sizes_of = small_suite() if small else suite()
    measures: list[Measure] = []
    with opened(checkpoint) as model:
        prompts = Prompts(model.tokenizer, sizes_of.full[0].prompt_length)
        huggingface = None if only == "exits" else exported(checkpoint)
        if only in (None, "full"):
            measures += full_depth_measures(huggingface, model, prompts, sizes_of.full)
            print(table(measures), flush=True)
        for sizes in sizes_of.exits if only in (None, "exits") else ():
            cells = exit_cells(model, prompts, sizes)
            print("", *exit_table(cells), sep="\n", flush=True)
            measures += [measure for cell in cells for measure in cell.measures]
        for sizes in sizes_of.speculation if only in (None, "speculation") else ():
            drafting = speculation_cells(model, huggingface, prompts, sizes)
            print("", *speculation_table(drafting), sep="\n", flush=True)
            measures += [measure for cell in drafting for measure in cell.measures]
    return measures


if __name__ == "__main__":
    sys.exit(main())
