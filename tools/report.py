"""A run as one HTML page that a browser shows without this project and without a network: report.py RUN

Reads the files of the run's folder and writes RUN/report.html: how it went, losses, speed, the pipeline, what other
tools measured of it, starts, checkpoints, and the config. What the run lacks is left out; one that is still going has a
report, too. The same files give the same page, byte for byte.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import report_sections as sections
from html_page import HtmlPage
from report_facts import facts_of, layout_of, model_of, outcome_of
from report_measured import Measured, find_measured, read_measured
from report_run import Run, read_run
from report_words import rounded
from show_schedule import MS, Shown, in_ms, show

from megatron_ee.config import Config
from megatron_ee.errors import UserError
from megatron_ee.training.observation.trace import read_trace

_NO_PICTURES = (
    "The pictures are missing: they need matplotlib (pip install 'megatron-ee[plots]'), and the tool run again."
)


def main() -> int:
    """Returns the exit status: 2 when the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of the run's report.html")
    parser.add_argument("--bench", type=Path, nargs="+", default=[], metavar="FILE", help="of a bench: its .json")
    depths = "of python -m megatron_ee.inference --depths; those in the run's folder or its pictures/ are found"
    parser.add_argument("--depths", type=Path, nargs="+", default=[], metavar="FILE", help=depths)
    arguments = parser.parse_args()
    output = arguments.output or arguments.run / "report.html"
    try:
        page = make_page(arguments.run, benches=arguments.bench, depths=arguments.depths)
        output.parent.mkdir(parents=True, exist_ok=True)
        page.save(output)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(output)
    return 0


def make_page(folder: Path, *, benches: Sequence[Path] = (), depths: Sequence[Path] = ()) -> HtmlPage:
    """The report of a run.

    Args:
        benches, depths: files that lie elsewhere.

    Raises:
        UserError: the folder is not a run's, or a file cannot be read; the message names it.
    """
    run, pictures = read_run(folder), _pictures()
    measured = [
        *find_measured(folder),
        *(read_measured(path, kind="bench") for path in benches),
        *(read_measured(path, kind="depths") for path in depths),
    ]
    outcome = outcome_of(run)
    page = HtmlPage(f"{run.name}: report of a training run", subtitle=f"{outcome[0].upper()}{outcome[1:]}.")
    page.facts(facts_of(run))
    if pictures is None:
        page.text(_NO_PICTURES)
    sections.add_losses(page, run, pictures)
    sections.add_settings(page, run, pictures)
    sections.add_speed(page, run, pictures)
    _add_pipeline(page, run, pictures)
    _add_measured(page, measured, pictures)
    sections.add_starts(page, run)
    sections.add_checkpoints(page, run)
    _add_config(page, run)
    sections.add_environment(page, run)
    return page


def _add_pipeline(page: HtmlPage, run: Run, pictures: ModuleType | None) -> None:
    """The plan of a step, the newest step that was recorded, and what each stage holds."""
    shown = _plan_of(run)
    page.heading("Stages")
    if isinstance(shown, str):
        page.text(shown)
    else:
        page.text(f"{shown.head[0][:1].upper()}{shown.head[0][1:]}.")
    if pictures and isinstance(shown, Shown) and len(shown.timeline.spans) > 1:
        caption = (
            "A step as planned: each box is a stage's work on the micro-batch of that number. The makespan is how long "
            "it all takes, the bubble the share of it in which stages idle."
        )
        page_lanes = [pictures.Lanes("plan", shown.timeline)]
        pictures.add_plan(page, page_lanes, unit=shown.unit, caption=caption)
    traces = sorted((run.folder / "traces").glob("step_*.json"))
    if pictures and traces:
        trace = read_trace(traces[-1])
        recorded, planned = in_ms(trace.recorded_timeline), in_ms(trace.planned_timeline)
        lanes = [pictures.Lanes("recorded", recorded), pictures.Lanes("plan with the recorded durations", planned)]
        pictures.add_plan(page, lanes, unit=MS, caption=f"Iteration {trace.iteration} as it ran, beside its plan.")
    sections.add_stages(page, run, shown.head[1:] if isinstance(shown, Shown) else ())


def _plan_of(run: Run) -> Shown | str:
    """Or why there is none."""
    if run.config is None:
        return "The folder has no config.yaml, which would say what stages hold and do."
    try:
        return show(run.config, run.num_processes)
    except UserError as error:
        return f"The plan of a step is not shown: {error}"


def _add_measured(page: HtmlPage, measured: Sequence[Measured], pictures: ModuleType | None) -> None:
    counted = [(of.path.name, of.tokens) for of in measured if of.tokens]
    sections.add_measured(page, "Decoding depths", [of for of in measured if of.kind == "depths"])
    if pictures and counted:
        pictures.add_depths(page, counted)
    others = [of for of in measured if of.kind not in ("depths", "bench", "unknown")]
    sections.add_measured(page, "Sweeps and measures", others)
    benches = [of for of in measured if of.kind == "bench"]
    sections.add_measured(page, "Benches", benches)
    if pictures and (goals := [goal for of in benches for goal in of.goals]):
        pictures.add_goals(page, goals)
    if unknown := [of.path.name for of in measured if of.kind == "unknown"]:
        page.heading("Other files")
        page.text(f"This report does not know what is in {', '.join(unknown)}.")


def _add_config(page: HtmlPage, run: Run) -> None:
    """The few facts that matter, and the whole file folded away."""
    page.heading("Config")
    if run.config is None:
        page.text("The folder has no config.yaml.")
        return
    page.facts(_settings_of(run, run.config))
    page.details("config.yaml, as the run goes on with it", run.config_text)


def _settings_of(run: Run, config: Config) -> dict[str, Any]:
    model, exits, data, training, optimizer = config.model, config.exits, config.data, config.training, config.optimizer
    batch = training.global_batch_size * data.sequence_length
    dataset = data.dataset if isinstance(data.dataset, str) else ", ".join(of.path for of in data.dataset)
    weights = ", ".join(map(rounded, exits.weights)) or "-"
    rates = f"learning rate {optimizer.lr:g} to {optimizer.min_lr:g}, {optimizer.lr_decay}"
    sizes = f"{training.global_batch_size:,} sequences, {batch:,} tokens; micro-batches of {training.micro_batch_size}"
    return {
        "Model": model_of(run),
        "Attention": f"{model.num_attention_heads} heads, {model.num_key_value_heads} of keys and values",
        "Loss weights of exits": f"{weights} (the final output's is 1)" if exits.layers else "-",
        "Processes": layout_of(run),
        "Data": f"{dataset}, tokenizer {data.tokenizer}, sequences of {data.sequence_length:,} tokens",
        "A step": sizes,
        "Optimizer": f"{optimizer.backend}, {rates}",
        "Begun with": str(config.checkpoint.initial or "random parameters"),
    }


def _pictures() -> ModuleType | None:
    try:
        import report_pictures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return report_pictures


if __name__ == "__main__":
    sys.exit(main())
