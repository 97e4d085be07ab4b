"""How many tokens a second are served, and what requests wait. Writes runs/bench/serve.json.

Mixed requests come all at once, or one by one, to a model with exits, on one core. Every strategy for which rows run
together, with every policy for missing keys and values, is held against lockstep, against full depth, against what no
strategy can do better with these depths, and against its own simulation. What is compared takes turns in one process; a
ratio is the median over rounds, and A/A of the same rounds, beside it as `aa`, says how much of it is noise.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from bench_decode import find
from bench_report import Measure, write
from bench_train import check

from megatron_ee.errors import FieldError, UserError
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/bench/checkpoint"), help="default: of `make bench-checkpoint`"
    )
    parser.add_argument("--small", action="store_true", help="few requests and rounds: seconds, and no figures")
    parser.add_argument(
        "--only", metavar="PART", help="one load, as measures are called: r16, r64, r16_poisson; or pipeline"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/serve.json"), metavar="FILE")
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


def run(checkpoint: Path, only: str | None, *, small: bool) -> list[Measure]:
    """All loads and pipelines, or one part, each printed when it is there."""
    from bench_decode_setup import opened
    from bench_serve_setup import small_suite, suite

    loads = {sizes.name: sizes for sizes in (small_suite() if small else suite())}
    if only is not None and only not in (*loads, "pipeline"):
        raise FieldError("--only", f"{only!r} is none of {', '.join(loads)}, pipeline")
    measures: list[Measure] = []
    with opened(checkpoint) as model:
        from bench_serve_rounds import Bench
        from bench_serve_table import measures_of, tables

        for name, sizes in loads.items():
            if only in (None, name):
                rounds = Bench(model, sizes).run()
                print(*tables(rounds), "", sep="\n", flush=True)
                measures += measures_of(rounds)
        if only in (None, "pipeline"):
            measures += _pipelines(checkpoint, model, small=small)
    return measures


def _pipelines(checkpoint: Path, model: "OpenedModel", *, small: bool) -> list[Measure]:
    import bench_serve_pipeline
    import bench_serve_two
    from bench_decode_setup import Prompts

    sleeping = bench_serve_pipeline.SMALL if small else bench_serve_pipeline.PipelineSizes()
    real = bench_serve_two.SMALL if small else bench_serve_two.TwoSizes()
    prompts = Prompts(model.tokenizer, real.prompt_length).of_round(0, 64)
    measures: list[Measure] = []
    for lines, found in chain(
        bench_serve_two.two_stage_measures(checkpoint, prompts, real),
        bench_serve_pipeline.pipeline_measures(sleeping),
    ):
        print(*lines, "", sep="\n", flush=True)
        measures += found
    return measures


if __name__ == "__main__":
    sys.exit(main())
