"""What a pipeline of stages gains by exits: tokens that leave come back at once. Part of `make bench-serve`.

Four stages that sleep as long as layers were measured to take stand in for four devices: planning and messages are the
real ones. Two real stages, of the bench's model, have a core each.
"""

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_ranks import run_on_ranks
from bench_report import Measure, measure_of
from bench_serve_costs import curve_of
from bench_serve_stages import Course, Ran, at_full_depth, mean_stages, serve_all

from megatron_ee.config import ExitsConfig, KvPolicy, ModelConfig, ParallelConfig
from megatron_ee.inference.scheduling.costs import Curve, SegmentCosts
from megatron_ee.inference.scheduling.workload import Depths

SHARES = {4: 0.4, 8: 0.2, 12: 0.1, 16: 0.3}
"""Where tokens leave, of 16 layers."""
EQUAL, SURVIVAL = (4, 8, 12, 16), (2, 5, 9, 16)
GOAL_OF_IDEAL = 0.9
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, slots=True)
class PipelineSizes:
    """
    Attributes:
        streams: sequences at a time.
        tokens: of each.
        rounds: the first is dropped.
        hidden_size, ffn_hidden_size, vocab_size: of the layers and heads that are measured.
    """

    streams: tuple[int, ...] = (1, 4, 16)
    tokens: int = 24
    rounds: int = 4
    hidden_size: int = 1536
    ffn_hidden_size: int = 4096
    vocab_size: int = 32768


SMALL = PipelineSizes((1, 2), tokens=3, rounds=2, hidden_size=64, ffn_hidden_size=128, vocab_size=256)


def measured_costs(sizes: PipelineSizes) -> SegmentCosts:
    """Of one layer, and of a head, of this size, with one thread: seconds by rows."""
    layer, head = _measured(sizes)
    num_layers = max(SHARES)
    return SegmentCosts({(number, number + 1): layer for number in range(num_layers)}, dict.fromkeys(SHARES, head))


def courses_of(costs: SegmentCosts, streams: int, tokens: int) -> dict[str, Course]:
    """By name; full depth has equal stages."""
    numbers = random.Random(streams)
    drawn = tuple(Depths(SHARES).draw(tokens, numbers) for _ in range(streams))
    exits = tuple(layer for layer in SHARES if layer < max(SHARES))

    def course(stops: tuple[int, ...], policy: KvPolicy) -> Course:
        return Course(stops, exits, drawn, policy, full=False, costs=costs)

    equal, survival = course(EQUAL, "fill"), course(SURVIVAL, "fill")
    return {
        "full": at_full_depth(equal),
        "equal_fill": equal,
        "equal_recompute": course(EQUAL, "recompute"),
        "survival_fill": survival,
        "survival_recompute": course(SURVIVAL, "recompute"),
        "full_survival": at_full_depth(survival),
        "full_again": at_full_depth(equal),
    }


def ideal(course: Course) -> float:
    """Of one stream over full depth, with every head that is asked: (L c + h) / (E[l] c + E[asked] h)."""
    layer, head = course.costs.of(0, 1, 1), course.costs.of_head(max(SHARES), 1)
    depths = [depth for of in course.depths for depth in of]
    asked = [sum(place <= depth for place in SHARES) for depth in depths]
    full = max(SHARES) * layer + head
    return full * len(depths) / (sum(depths) * layer + sum(asked) * head)


def pipeline_measures(sizes: PipelineSizes) -> Iterator[tuple[list[str], list[Measure]]]:
    """For each number of streams a table, and measures."""
    costs = measured_costs(sizes)
    for streams in sizes.streams:
        courses = courses_of(costs, streams, sizes.tokens)
        ran = run_on_ranks(len(EQUAL), serve_all, [*courses.values()], sizes.rounds)[0]
        of = {name: served[1:] for name, served in zip(courses, ran, strict=True)}
        yield _table(streams, courses, of), [*_measures(streams, courses, of, sizes)]


def _measures(
    streams: int, courses: dict[str, Course], of: dict[str, list[Ran]], sizes: PipelineSizes
) -> Iterator[Measure]:
    for name, course in courses.items():
        if name.startswith("full"):
            continue
        over = _over(of[name], of["full"])
        aa = statistics.median(_over(of["full_again"], of["full"]))
        context = _context(course, of[name], sizes)
        yield measure_of(f"pipeline_over_full_{name}_s{streams}", over, "higher", aa, context)
        if streams == 1 and course.stops == EQUAL:
            for what, bound, goal in (
                ("of_bound", len(EQUAL) / mean_stages(course), None),
                ("of_ideal", ideal(course), GOAL_OF_IDEAL),
            ):
                values = [one / bound for one in over]
                yield measure_of(f"pipeline_{what}_{name}_s1", values, "higher", aa, context, goal)
        if course.stops == SURVIVAL:
            equal = of[name.replace("survival", "equal")]
            yield measure_of(f"pipeline_{name}_over_equal_s{streams}", _over(of[name], equal), "higher", aa, context)


def _table(streams: int, courses: dict[str, Course], of: dict[str, list[Ran]]) -> list[str]:
    shares = ", ".join(f"{share:.0%} after {layer}" for layer, share in SHARES.items())
    lines = [
        f"{len(EQUAL)} stages that sleep, {streams} stream{'s' * (streams > 1)}; tokens leave: {shares}",
        f"{'stages, missing KV':<22}{'tokens/s':>9}{'/full':>8}{'P/E[s]':>8}{'ideal':>8}{'A/A':>7}"
        "   stages' time on tokens + filling alone",
    ]
    aa = statistics.median(_over(of["full_again"], of["full"]))
    for name, course in courses.items():
        if name == "full_again":
            continue
        ran = of[name]
        speed = statistics.median(one.tokens / one.seconds for one in ran)
        bound = 1.0 if course.full else len(course.stops) / mean_stages(course)
        best = f"{ideal(course):.2f}x" if streams == 1 and not course.full else ""
        busy = "  ".join(
            f"{_median([one.real[stage] for one in ran]):.0%}+{_median([one.filled[stage] for one in ran]):.0%}"
            for stage in range(len(course.stops))
        )
        over = statistics.median(_over(ran, of["full"]))
        lines.append(
            f"{name.replace('_', ' '):<22}{speed:>9.1f}{over:>7.2f}x{bound:>7.2f}x{best:>8}{aa:>7.3f}   {busy}"
        )
    return lines


def _over(ran: Sequence[Ran], full: Sequence[Ran]) -> list[float]:
    """Tokens per second over those of the same round."""
    return [own.tokens / own.seconds / (other.tokens / other.seconds) for own, other in zip(ran, full, strict=True)]


def _context(course: Course, ran: Sequence[Ran], sizes: PipelineSizes) -> dict[str, Any]:
    return {
        "stops": course.stops,
        "policy": course.policy,
        "mean_stages": mean_stages(course),
        "tokens_per_second": statistics.median(one.tokens / one.seconds for one in ran),
        "stages_real": [_median([one.real[stage] for one in ran]) for stage in range(len(course.stops))],
        "stages_filled": [_median([one.filled[stage] for one in ran]) for stage in range(len(course.stops))],
        "layer_seconds": course.costs.segments[0, 1],
        "head_seconds": course.costs.heads[max(course.costs.heads)],
        "hidden_size": sizes.hidden_size,
        "torch": torch.__version__,
    }


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _measured(sizes: PipelineSizes) -> tuple[Curve, Curve]:
    """Of a model of four layers, so that none finds its weights in a cache."""
    from megatron_ee.device import choose_device
    from megatron_ee.inference.measures import MEASURES
    from megatron_ee.inference.opened import OpenedModel
    from megatron_ee.inference.weight_layout import arrange_weights
    from megatron_ee.model.initialize import initialize
    from megatron_ee.model.stage import Stage
    from megatron_ee.parallel.layout import place
    from megatron_ee.parallel.mesh import open_mesh
    from megatron_ee.tokenizer import ByteTokenizer

    device = choose_device("cpu")
    model = ModelConfig(
        num_layers=4,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.ffn_hidden_size,
        num_attention_heads=max(1, sizes.hidden_size // 64),
        vocab_size=sizes.vocab_size,
    )
    exits, parallel = ExitsConfig(layers=(2,)), ParallelConfig()
    (chunks,) = place(model, exits, parallel)
    mesh = open_mesh(parallel, device)
    stage = Stage(model, exits, chunks, vocab_size=sizes.vocab_size, groups=mesh.groups, device=device)
    initialize(stage, 0)
    stage.eval().requires_grad_(False)
    arrange_weights(stage)
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = sizes.vocab_size
    opened = OpenedModel(stage, tokenizer, (2,), MEASURES)
    layers: list[tuple[int, float]] = []
    heads: list[tuple[int, float]] = []
    for rows in _ROWS:
        layer, head = _timed(opened, rows)
        layers.append((rows, layer / model.num_layers))
        heads.append((rows, head))
    return curve_of(layers), curve_of(heads)


def _timed(model: Any, rows: int) -> tuple[float, float]:
    """Seconds of all layers and of a head, of so many sequences of one row each."""
    from bench_decode_costs import Launches
    from bench_decode_setup import Sizes

    launch = Launches(model, Sizes(rows, prompt_length=16, new_tokens=32)).of(rows, 1)
    runner, num_layers = model.runner, model.stage.model.num_layers
    works: Any = []
    with torch.inference_mode():
        x_NH = runner.embed(range(rows))
        works = [
            partial(runner.run, x_NH, launch, 0, num_layers),
            lambda: runner.project(runner.features(x_NH, num_layers), num_layers).softmax(-1).amax(-1).tolist(),
        ]
        seconds: list[list[float]] = [[], []]
        for number in range(8):
            for work, of in zip(works, seconds, strict=True):
                started = time.process_time()
                work()
                if number:
                    of.append(time.process_time() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
