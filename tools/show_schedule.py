"""Show what stages do, in training or in decoding: show_schedule.py CONFIG [key.path=value ...]

Of a config it is the training step. Nothing runs: the plan is simulated, with the durations that `parallel.costs`
chooses. With --output it is drawn as a picture too. With --trace, a step that a run has recorded
(`logging.trace_iterations`) is shown beside its plan.

    python tools/show_schedule.py --decoding FILE [--output lanes.png] [--clock seconds] [--window BEGIN END]

shows the stages of a decoding pipeline as they ran, with what was filled in and where they idled: what
`python -m megatron_ee.inference --record FILE` or `simulate_serving.py --record FILE` noted.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import decoding_lanes

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, open_config
from megatron_ee.config.checks import BUILT_IN
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.decoding_record import read_record
from megatron_ee.model.vocabulary import planned_vocab_size
from megatron_ee.parallel.costs import ESTIMATED, chunk_costs, costs_of, weight_share
from megatron_ee.parallel.layout import describe_layout, place
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.pipeline.timeline import Span, Timeline, draw
from megatron_ee.parallel.world import check_world, count_microbatches, data_parallel_size
from megatron_ee.training.observation.trace import Trace, TraceError, read_trace
from megatron_ee.training.planning import MEGATRON, plan_step, schedule_of

MS = "ms"
NARROWEST = 40


class Shown(NamedTuple):
    """A config's step.

    Attributes:
        unit: of the timeline's times.
    """

    plan: Plan
    timeline: Timeline
    unit: str
    head: tuple[str, ...]


def main() -> int:
    """Returns the exit status: 2 when the user has to change something."""
    arguments = _parse()
    try:
        if arguments.decoding:
            _show_decoding(arguments)
            return 0
        trace = read_trace(arguments.trace) if arguments.trace else None
        with open_config(arguments.config, arguments.overrides, read_model=read_model) as config:
            shown = show(config, arguments.world_size or (trace.world_size if trace else None))
        if trace:
            check_same_plan(arguments.trace, trace, shown.plan)
        if arguments.output:
            _save_picture(arguments.output, shown, trace)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    lines = lines_of(shown, width=arguments.width)
    if trace:
        lines += ["", *lines_of_trace(trace, width=arguments.width)]
    if arguments.output:
        lines += ["", str(arguments.output)]
    print("\n".join(lines))
    return 0


def _show_decoding(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UserError: the file is no record, or has nothing to show.
    """
    record, output, window = read_record(arguments.decoding), arguments.output, arguments.window
    lines = [*decoding_lanes.lines_of(record, arguments.clock, window and tuple(window), width=arguments.width)]
    if output and output.suffix == ".txt":
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif output:
        with _needing_matplotlib():
            from decoding_picture import save_picture

            save_picture(output, record, arguments.clock, window and tuple(window))
    print("\n".join([*lines, *(["", str(output)] if output else [])]))


def show(config: Config, world_size: int | None) -> Shown:
    """The step of a config for so many processes; None: for one pipeline, or as many as the config says.

    Raises:
        FieldError: the processes don't fit, the schedule is a plug-in's, or the costs cannot be read.
    """
    parallel, training = config.parallel, config.training
    built_in = BUILT_IN["parallel.schedule"]
    if parallel.schedule not in built_in:
        known = ", ".join(built_in)
        raise FieldError("parallel.schedule", f"this tool knows {known}, not the plug-in's {parallel.schedule!r}")
    if world_size is None:
        world_size = parallel.tensor * parallel.pipeline * (1 if parallel.data == "auto" else parallel.data)
    check_world(config, world_size)
    data_size = data_parallel_size(parallel, world_size)
    num_microbatches = count_microbatches(training.global_batch_size, training.micro_batch_size, data_size)

    vocab_size = planned_vocab_size(config)
    costs = costs_of(config, vocab_size)
    layout = place(config.model, config.exits, parallel, costs, depth=config.depth)
    plan = plan_step(config, layout, vocab_size, num_microbatches)
    has_weights = any(action.kind is Kind.W for actions in plan.actions for action in actions)
    cost = chunk_costs(layout, config.exits, costs, weights=weight_share(config) if has_weights else None)
    is_estimated = parallel.costs == ESTIMATED
    scale, unit = (1 / costs.layer_forward, "layer forwards") if is_estimated else (1e3, MS)

    def scaled(action: Action) -> float:
        return scale * cost(action)

    timeline = simulate(plan, scaled, transfer=scale * costs.transfer)
    head = (_describe(config, plan), *describe_layout(layout, config.exits, costs))
    return Shown(plan, timeline, unit, head)


def lines_of(shown: Shown, *, width: int) -> list[str]:
    """A step as text: what it is, the placement, the timeline, and a table of stages."""
    timeline, unit = shown.timeline, shown.unit
    return [
        *shown.head,
        "",
        draw(timeline, width=width),
        "",
        *_table(timeline, unit),
        "",
        f"makespan {timeline.makespan:,.2f} {unit}, bubble {timeline.bubble_fraction:.1%}",
    ]


def lines_of_trace(trace: Trace, *, width: int) -> list[str]:
    """A recorded step as text, beside its plan."""
    recorded, planned = (in_ms(timeline) for timeline in (trace.recorded_timeline, trace.planned_timeline))
    return [
        f"iteration {trace.iteration} as recorded, in {MS}",
        draw(recorded, width=width),
        "",
        *_table(recorded, MS),
        "",
        f"{'':<28}{'makespan':>14}{'bubble':>9}",
        f"{'recorded':<28}{recorded.makespan:>11,.2f} {MS}{recorded.bubble_fraction:>9.1%}",
        f"{'plan, recorded durations':<28}{planned.makespan:>11,.2f} {MS}{planned.bubble_fraction:>9.1%}",
        f"{'recorded / plan':<28}{recorded.makespan / planned.makespan:>14.3f}",
    ]


def in_ms(timeline: Timeline) -> Timeline:
    """From seconds."""
    lanes = tuple(
        tuple(Span(span.action, 1e3 * span.start, 1e3 * span.end) for span in lane) for lane in timeline.spans
    )
    return Timeline(timeline.schedule, lanes, timeline.num_regular)


def check_same_plan(path: Path, trace: Trace, plan: Plan) -> None:
    """
    Raises:
        TraceError: the step is of another plan than the config's.
    """
    of_both = (
        ("schedule", trace.schedule, plan.schedule),
        ("stages", len(trace.recorded), plan.num_stages),
        ("chunks a stage", trace.num_chunks, plan.num_chunks),
        ("micro-batches", trace.num_regular, plan.num_regular),
        ("fills", _fills(trace.fills), _fills(plan.fills)),
        ("exits", _exits([[span.action for span in lane] for lane in trace.recorded]), _exits(plan.actions)),
    )
    for name, recorded, own in of_both:
        if recorded != own:
            raise TraceError(f"{path}: {name}: {recorded}, but the config's plan has {own}; give the run's config.yaml")


def _describe(config: Config, plan: Plan) -> str:
    asked = config.parallel.schedule
    own = schedule_of(config)
    schedule = f"{asked}-core's own, shown as our {own}" if asked == MEGATRON else own
    chunks = f" of {plan.num_chunks} chunks" if plan.num_chunks > 1 else ""
    fills = f", fills: {_fills(plan.fills)}" if plan.fills or own == "filled-1f1b" else ""
    costs = "estimated" if config.parallel.costs == ESTIMATED else f"measured, {config.parallel.costs}"
    return (
        f"schedule {schedule}, {plan.num_stages} stages{chunks}, {plan.num_regular} micro-batches{fills}; costs {costs}"
    )


def _fills(fills: Sequence[Fill]) -> str:
    kinds = [fill.kind for fill in fills]
    return f"{kinds.count('warmup')} warm-up and {kinds.count('cooldown')} cool-down"


def _exits(actions: Sequence[Sequence[Action]]) -> str:
    """How often each stage runs X."""
    return "/".join(str(sum(action.kind is Kind.X for action in of_stage)) for of_stage in actions)


def _table(timeline: Timeline, unit: str) -> list[str]:
    lines = [f"{'stage':<7}{'busy':>8}{'idle (' + unit + ')':>24}{'most live micro-batches':>26}"]
    for stage, (busy, live) in enumerate(zip(timeline.busy, timeline.peak_activations, strict=True)):
        share = busy / timeline.makespan if timeline.makespan else 0.0
        lines.append(f"{stage:<7}{share:>8.1%}{timeline.makespan - busy:>24,.2f}{live:>26}")
    return lines


def _save_picture(output: Path, shown: Shown, trace: Trace | None) -> None:
    with _needing_matplotlib():
        from schedule_picture import Lanes, save_picture, summary
    if trace is None:
        groups, unit = [Lanes("plan", shown.timeline)], shown.unit
    else:
        timelines = in_ms(trace.recorded_timeline), in_ms(trace.planned_timeline)
        names = f"recorded, iteration {trace.iteration}", "plan with the recorded durations"
        groups, unit = [Lanes(*pair) for pair in zip(names, timelines, strict=True)], MS
    first = groups[0].timeline
    title = f"{first.schedule}: {summary(first, unit)}"
    if trace is not None:
        title = f"{first.schedule}, recorded: {first.makespan / groups[1].timeline.makespan:.3f} of the plan's makespan"
    save_picture(output, groups, title=title, unit=unit)


@contextmanager
def _needing_matplotlib() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("--output: pictures need matplotlib: pip install 'megatron-ee[plots]'") from error


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--world-size", type=_at_least(1), metavar="N", help="processes; default: one pipeline's")
    parser.add_argument("--output", type=Path, metavar="PICTURE", help="draw it too, as a .png or .svg")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a recorded step: RUN/traces/step_00000003.json")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--decoding", type=Path, metavar="FILE", help="a record of a pipeline; --output: .txt, too")
    decoding.add_argument("--clock", choices=("virtual", "seconds"), help="of estimated costs, or real (virtual)")
    decoding.add_argument("--window", type=float, nargs=2, metavar=("BEGIN", "END"), help="default: all of it")
    width = shutil.get_terminal_size().columns
    parser.add_argument(
        "--width", type=_at_least(NARROWEST), default=max(width, NARROWEST), help="default: the terminal's"
    )
    arguments = parser.parse_intermixed_args()
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.decoding is None:
        if arguments.config is None:
            parser.error("name a CONFIG, or --decoding FILE")
        if arguments.clock or arguments.window:
            parser.error("--clock and --window are for --decoding")
        return
    if arguments.config or arguments.trace or arguments.world_size:
        parser.error("--decoding goes with neither CONFIG nor --trace nor --world-size")
    if arguments.window and not arguments.window[0] < arguments.window[1]:
        parser.error(f"--window: {arguments.window[0]:g} is not before {arguments.window[1]:g}")
    arguments.clock = arguments.clock or "virtual"


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {least}")
        return int(text)

    return count


if __name__ == "__main__":
    sys.exit(main())
