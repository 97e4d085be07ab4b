"""Train and measure all that docs/results.md says, and write it: reproduce.py [--books FILE] [--only NAME ...]

    python tools/reproduce.py --books books.jsonl.gz     everything; hours on two cores, minutes of training on a GPU
    python tools/reproduce.py --quick                    everything in miniature, on the built-in corpus: no figures
    python tools/reproduce.py --budget                   what would be trained, and for how long; nothing is started

What is there is kept: stopped at any time, the same command goes on. --only names runs, their configs, or what is
measured when they are trained, and does nothing else.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from report_run import read_json
from reproduce_corpus import Corpus, make_corpus
from reproduce_costs import measure_costs
from reproduce_measurements import NAMES, TRUNK, make, measurements, train_trunk
from reproduce_page import page_of
from reproduce_pictures import save_pictures
from reproduce_results import Results
from reproduce_runs import Place, Run, StoppedError, all_runs, in_order
from reproduce_training import QUICK, Work, begin, budget, machine_overrides

from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.json_files import write_json
from megatron_ee.log import quiet_dependencies

RESULTS = Path("docs/results")
COSTS = "costs"
"""The name of what steps cost; see `measure_costs`."""


def main() -> int:
    """Returns the exit status: 2 when the user has to change something, 75 when it was stopped."""
    arguments = _parse()
    quiet_dependencies()
    try:
        chosen = [*machine_overrides(), *(QUICK if arguments.quick else ())]
        place = Place(arguments.folder, chosen)
        runs, names = _chosen(all_runs(1 if arguments.quick else 3), arguments.only)
        if arguments.budget:
            print(budget(runs, place))
            return 0
        if not arguments.page:
            corpus = make_corpus(arguments.books, arguments.folder / "data", quick=arguments.quick)
            train(runs, Place(arguments.folder, [*corpus.overrides, *chosen]), corpus, arguments)
            measure(names, corpus, arguments)
        write_page(arguments.output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except (StoppedError, KeyboardInterrupt):
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 75
    return 0


def train(runs: list[Run], place: Place, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Every run, and its figures into runs.json as soon as there are any."""
    path = arguments.output / "runs.json"
    figures: dict[str, Any] = read_json(path)["runs"] if path.exists() else {}
    begun = partial(begin, place.folder / "logs/worker.log")
    for run, of_run in in_order(runs, arguments.at_once, Work(place, corpus, quick=arguments.quick), begun):
        figures[run.name] = of_run
        print(f"{run.name:<22}" + "  ".join(f"{at}: {loss:.4f}" for at, loss in of_run["loss"].items()), flush=True)
        whole = {name: figures[name] for name in sorted(figures)}
        write_json(path, {"held_out": corpus.held_out, "runs": whole}, indent=None)


def measure(names: Sequence[str], corpus: Corpus, arguments: argparse.Namespace) -> None:
    """What is not there yet of these."""
    path = arguments.output / f"{COSTS}.json"
    if COSTS in names and not path.exists():
        write_json(path, measure_costs(quick=arguments.quick))
    chosen = [of for of in measurements(arguments.folder, corpus, quick=arguments.quick) if of.name in names]
    if any(TRUNK in of.arguments for of in chosen):
        train_trunk(arguments.folder / "logs/trunk.log")
    for measurement in chosen:
        make(measurement, arguments.output, arguments.folder / "logs" / f"{measurement.name}.log")


def write_page(folder: Path) -> None:
    """The page beside the folder of figures, with its pictures in there; without one where figures are missing."""
    results = Results.read(folder)
    missing = [run.config for run in all_runs() if run.config not in results.by_config]
    if missing or COSTS not in results.content:
        print(f"no page yet: there are no figures of {[*missing, COSTS][0]}")
        return
    save_pictures(results, folder)
    page = folder.with_suffix(".md")
    page.write_text(page_of(results), encoding="utf-8")
    print(page)


def _chosen(runs: list[Run], only: list[str] | None) -> tuple[list[Run], Sequence[str]]:
    """Runs, by their names or those of their configs, and measurements.

    Raises:
        FieldError: there is none of a name.
    """
    measured = (COSTS, *NAMES)
    if only is None:
        return runs, measured
    for name in only:
        if name not in measured and not any(name in (run.name, run.config) for run in runs):
            raise FieldError("--only", f"there is no run {name!r}, and nothing of that name is measured")
    return [run for run in runs if run.name in only or run.config in only], [name for name in measured if name in only]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--books", type=Path, metavar="FILE", help="a .jsonl(.gz) of `title` and `text`; default: the built-in corpus"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help=f"of a run, a config or a measurement ({', '.join((COSTS, *NAMES))}); may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="in miniature: minutes, and no figures")
    parser.add_argument("--budget", action="store_true", help="print what is trained for how long, and end")
    parser.add_argument("--page", action="store_true", help="write the page of the figures that are there, and end")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count(), metavar="N", help="runs beside each other (one a core)"
    )
    parser.add_argument("--folder", type=Path, help="of runs and data (runs/results; quick: runs/quick_results)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of figures (docs/results; quick: in --folder)")
    arguments = parser.parse_args()
    if arguments.at_once < 1:
        parser.error(f"--at-once: {arguments.at_once} is below 1")
    if arguments.quick and arguments.books is not None:
        parser.error("--quick is on the built-in corpus, without --books")
    arguments.folder = arguments.folder or Path("runs/quick_results" if arguments.quick else "runs/results")
    arguments.output = arguments.output or (arguments.folder / "results" if arguments.quick else RESULTS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
