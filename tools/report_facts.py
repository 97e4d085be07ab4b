"""What a busy engineer wants to know of a run before anything else."""

import math
from collections.abc import Mapping
from statistics import median

from html_page import Value
from report_run import Run, Start
from report_words import duration, each_or_one, fault, large, moment, rounded, share, size, told

from megatron_ee.config import Config
from megatron_ee.errors import UserError
from megatron_ee.model.vocabulary import planned_vocab_size
from megatron_ee.parallel.estimate import estimate
from megatron_ee.training.operations.attempts import COMPLETE, REFUSED, STOPPED

_MOST_EXITS = 8  # whose losses are said


def facts_of(run: Run) -> dict[str, Value]:
    """Names and what they are, in the order of the page. What was not recorded is left out."""
    facts = {
        "Training": _progress(run),
        "Validation loss": _validation(run),
        "Speed": _speed(run),
        "Time": _time(run),
        "Model": model_of(run),
        "Processes": layout_of(run),
        "Pipeline": _bubble(run),
        "Memory": _memory(run),
        "Trouble": "; ".join(trouble_of(run)) or "none recorded: no step was skipped, no rank failed",
        "Checkpoint": _checkpoint(run),
    }
    return {name: value for name, value in facts.items() if value}


def outcome_of(run: Run) -> str:
    """How the newest start ended, in a sentence."""
    of = f" of {run.config.training.train_iters:,}" if run.config else ""
    if not run.starts:
        return f"unknown: the folder has no attempts/; its record goes to iteration {run.last_iteration:,}{of}"
    start = run.starts[-1]
    reason, at = start.outcome.get("reason"), f"iteration {rounded(start.outcome.get('iteration'))}{of}"
    match start.outcome.get("exit_status"):
        case status if status == COMPLETE:
            return f"complete, at {at}"
        case status if status == STOPPED:
            return f"stopped by {reason} after {at}; started again, it goes on"
        case status if status == REFUSED:
            return f"ended by what has to be changed, after {at}: {reason}"
        case status if status is not None:
            return f"ended with status {status}, after {at}: {reason}"
    if start.faults:
        return f"failed: {fault(start.faults[0])}"
    return f"no end is recorded: it is still going, or was killed. {_last_sign(run, start)}"


def trouble_of(run: Run) -> list[str]:
    """Skipped steps, faults, slow ranks, lost work: what was not as it should be."""
    skipped = int(sum(filter(math.isfinite, run.series("train/skipped")[1])))
    spoilt = sum(start.spoilt_batches for start in run.starts)
    found = [f"{_times(skipped, 'step')} skipped, whose gradients were no numbers"] if skipped else []
    found += [f"{_times(spoilt, 'batch', 'batches')} noted in attempts/N/nonfinite.jsonl"] if spoilt else []
    found += [f"start {start.number}: {fault(of)}" for start in run.starts for of in start.faults]
    iterations, ratios = run.series("perf/slowest_rank_ratio")
    most = run.config.faults.straggler_ratio if run.config else 0.0
    if ratios and 0.0 < most < max(ratios):
        at = iterations[ratios.index(max(ratios))]
        found.append(f"a rank took {max(ratios):.2f} times as long as the others of its stage (iteration {at:,})")
    if run.lost_records:
        found.append(f"{_times(run.lost_records, 'record')} of iterations that were done again (metrics.jsonl.lost)")
    if damaged := [name for name in run.other_steps if name.startswith("damaged_")]:
        found.append(f"damaged checkpoints: {', '.join(damaged)}")
    return found


def seconds_of(run: Run, start: Start) -> float | None:
    """How long a start took: to its outcome, or, of the newest, to the last sign of life; None: that is not known."""
    ended = start.outcome.get("time")
    if ended is None and run.heartbeat.get("attempt") == start.number:
        ended = run.heartbeat.get("time")
    begun, over = moment(start.environment.get("started")), moment(ended)
    return (over - begun).total_seconds() if begun and over else None


def model_of(run: Run) -> str:
    """Its size and its exits."""
    if (config := run.config) is None:
        return ""
    model, exits = config.model, config.exits
    parameters = parameters_of(run)
    counted = f"{large(parameters)} parameters, " if parameters else ""
    where = f"exits after {', '.join(map(str, exits.layers))}" if exits.layers else "no early exits"
    heads = f" (heads: {each_or_one(exits.head)}, projection: {each_or_one(exits.projection)})" if exits.layers else ""
    return f"{counted}{model.num_layers} layers of width {model.hidden_size}, {where}{heads}"


def parameters_of(run: Run) -> int | None:
    """How many the model has; None: the size of its vocabulary, or a file that its config names, is not there."""
    if (config := run.config) is None:
        return None
    try:
        vocab_size = vocab_size_of(run, config)
        parallel = config.parallel.model_copy(update={"data": 1, "costs": "estimated"})
        one = config.model_copy(update={"parallel": parallel})
        return estimate(one, parallel.tensor * parallel.pipeline, vocab_size).parameters
    except UserError:
        return None


def vocab_size_of(run: Run, config: Config) -> int:
    """A checkpoint knows it, also where the tokenizer is not at hand.

    Raises:
        FieldError: there is neither.
    """
    known = [of.about.get("vocab_size") for of in run.checkpoints]
    return known[-1] if known and isinstance(known[-1], int) else planned_vocab_size(config)


def layout_of(run: Run) -> str:
    """How the model is split, and over how many."""
    if (config := run.config) is None:
        return ""
    parallel = config.parallel
    counted = f"{run.num_processes} in all: " if run.num_processes else ""
    chunks = f" of {parallel.chunks} chunks" if parallel.chunks > 1 else ""
    stages = f"{_times(parallel.pipeline, 'pipeline stage')}{chunks}, schedule {parallel.schedule}"
    data = "data parallel by what is left" if parallel.data == "auto" else f"data parallel {parallel.data}"
    return f"{counted}{stages}, tensor parallel {parallel.tensor}, {data}; {config.training.precision}"


def _last_sign(run: Run, start: Start) -> str:
    of, beat = f" of {run.config.training.train_iters:,}" if run.config else "", run.heartbeat
    if beat.get("attempt") != start.number:
        return f"Its record goes to iteration {run.last_iteration:,}{of}"
    where = f"iteration {rounded(beat.get('iteration'))}{of}, at {beat.get('phase')}"
    return f"Last sign of life: {told(beat.get('time'))}, {where}"


def _progress(run: Run) -> str:
    if not run.records:
        return "nothing has been logged yet"
    of = f" of {run.config.training.train_iters:,}" if run.config else ""
    _, tokens = run.series("train/tokens")
    counted = f", {large(tokens[-1])} tokens seen" if tokens else ""
    return f"{run.last_iteration:,}{of} iterations in the record{counted}"


def _validation(run: Run) -> str:
    if run.losses.validation:
        iteration, losses = run.losses.validation[-1]
        return f"{_each(run, losses)} nats per token, at iteration {iteration:,}"
    if not run.losses.training:
        return ""
    iteration, losses = run.losses.training[-1]
    return f"none was measured; training loss: {_each(run, losses)} nats per token, at iteration {iteration:,}"


def _each(run: Run, losses: Mapping[int, float]) -> str:
    said = [f"{run.exit_names[layer]}: {loss:.4f}" for layer, loss in losses.items()]
    if len(said) > _MOST_EXITS:
        said = [said[0], f"... ({len(said) - 2} more below)", said[-1]]
    return ", ".join(said)


def _speed(run: Run) -> str:
    _, speeds = run.series("perf/tokens_per_s")
    _, steps = run.series("perf/iter_time_s")
    _, utilization = run.series("perf/mfu")
    said = [f"{rounded(median(speeds))} tokens/s"] if speeds else []
    said += [f"{rounded(median(steps))} s a step"] if steps else []
    said += [f"{share(median(utilization))} of the GPUs' peak (MFU)"] if utilization else []
    return f"{', '.join(said)} (medians of {_times(len(speeds), 'record')})" if said else ""


def _time(run: Run) -> str:
    known = [seconds for start in run.starts if (seconds := seconds_of(run, start)) is not None]
    if not known:
        return ""
    at_least = "at least " if len(known) < len(run.starts) else ""
    return f"{at_least}{duration(sum(known))} in {_times(len(run.starts), 'start')}"


def _bubble(run: Run) -> str:
    _, idle = run.series("pipeline/bubble_fraction")
    _, planned = run.series("pipeline/planned_bubble_fraction")
    beside = f"; {share(median(planned))} by the plan at the speed measured" if planned else ""
    return f"idle for {share(median(idle))} of its time{beside} (medians)" if idle else ""


def _memory(run: Run) -> str:
    _, peaks = run.series("memory/peak_gib")
    return f"{rounded(max(peaks))} GiB at most on a rank" if peaks else ""


def _checkpoint(run: Run) -> str:
    if not run.checkpoints:
        return "none"
    newest = run.checkpoints[-1]
    return f"step {newest.iteration:,}, {size(newest.num_bytes)}; {_times(len(run.checkpoints), 'checkpoint')} in all"


def _times(count: int, what: str, plural: str = "") -> str:
    return f"{count:,} {what if count == 1 else plural or f'{what}s'}"
