"""Two stages of the bench's model, each with a core of its own: nothing sleeps. Part of `make bench-serve`."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from bench_ranks import run_on_ranks
from bench_report import Measure, measure_of

from megatron_ee.config import ExitParams, SamplingParams, SchedulingParams
from megatron_ee.device import choose_device
from megatron_ee.inference.opening import open_decoding_config
from megatron_ee.inference.request import Emission, Request

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel

_FULL: dict[str, Any] = {"mode": "full"}
_STAGES = 2


@dataclass(frozen=True, slots=True)
class TwoSizes:
    """
    Attributes:
        streams: sequences at a time.
        tokens: of each answer.
        rounds: the first is dropped.
        threshold: of the largest probability.
    """

    streams: tuple[int, ...] = (1, 4)
    tokens: int = 64
    rounds: int = 8
    threshold: float = 0.4
    prompt_length: int = 32


SMALL = TwoSizes((1,), tokens=3, rounds=2, prompt_length=4)


@dataclass(frozen=True, slots=True)
class _Ran:
    seconds: float
    depths: list[int]


def two_stage_measures(checkpoint: Path, prompts: Sequence[tuple[int, ...]], sizes: TwoSizes) -> Iterator[Any]:
    """For each number of streams a table, and measures."""
    for streams in sizes.streams:
        args = (checkpoint, [of[: sizes.prompt_length] for of in prompts], streams, sizes)
        two = run_on_ranks(_STAGES, _rounds_of, *args, _STAGES)[0]
        (one,) = run_on_ranks(1, _rounds_of, *args, 1)
        yield _table(streams, two, one), [*_measures(streams, two, one, sizes)]


def _settings(sizes: TwoSizes) -> dict[str, dict[str, Any]]:
    exits = {"threshold": sizes.threshold}
    return {
        "full": _FULL,
        "fill": {**exits, "kv_policy": "fill"},
        "recompute": {**exits, "kv_policy": "recompute"},
        "full_again": _FULL,
    }


def _rounds_of(
    checkpoint: Path, prompts: list[tuple[int, ...]], streams: int, sizes: TwoSizes, stages: int
) -> dict[str, list[_Ran]]:
    """On every rank the same. Other prompts in every round."""
    from megatron_ee.inference.loading import load_model

    torch.set_num_threads(1)
    overrides = ["device=cpu", f"inference.parallel.pipeline={stages}"]
    with open_decoding_config(checkpoint, overrides) as config:
        model = load_model(checkpoint, config, choose_device("cpu"))
    settings = _settings(sizes)
    ran: dict[str, list[_Ran]] = {name: [] for name in settings}
    for number in range(sizes.rounds):
        own = [prompts[(number * streams + place) % len(prompts)] for place in range(streams)]
        for name, exit_settings in settings.items():
            ran[name].append(_serve(model, own, ExitParams.model_validate(exit_settings), sizes))
    return {name: of[1:] for name, of in ran.items()}


def _serve(model: "OpenedModel", prompts: Sequence[tuple[int, ...]], params: ExitParams, sizes: TwoSizes) -> _Ran:
    from megatron_ee.inference.batch import Batch
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.scheduling.strategies.named import planner_for

    count, chunk = len(prompts), 512
    batch = Batch(model, slots=count, capacity=sizes.prompt_length + sizes.tokens, prefill_chunk=chunk)
    costs, depths = model.launch_costs, model.depths
    planner = planner_for(SchedulingParams(), costs, model.stages, depths, residents=count, prefill_chunk=chunk)
    engine = Engine(batch, planner)
    for prompt in prompts:
        engine.add(Request(prompt, SamplingParams(max_new_tokens=sizes.tokens, ignore_eos=True), params))
    dist.barrier()
    found: list[int] = []
    started = 0.0
    while not engine.is_idle:
        for _, emission in engine.step():
            assert isinstance(emission, Emission)
            started = started or time.perf_counter()  # at the first token: prompts are another matter
            found.append(emission.exit_layer)
    seconds = time.perf_counter() - started
    engine.close()
    return _Ran(seconds, found[1:])


def _measures(
    streams: int, two: dict[str, list[_Ran]], one: dict[str, list[_Ran]], sizes: TwoSizes
) -> Iterator[Measure]:
    aa = statistics.median(_over(two["full_again"], two["full"]))
    context = {"torch": torch.__version__, "tokens": sizes.tokens, "threshold": sizes.threshold}
    for name in ("fill", "recompute"):
        own = {**context, "mean_stages": _mean_stages(two[name]), "bound": _STAGES / _mean_stages(two[name])}
        over = _over(two[name], two["full"])
        yield measure_of(f"pipeline2_over_full_{name}_s{streams}", over, "higher", aa, own)
    over = _over(two["full"], one["full"])
    yield measure_of(f"pipeline2_full_over_one_process_s{streams}", over, "higher", aa, context)


def _table(streams: int, two: dict[str, list[_Ran]], one: dict[str, list[_Ran]]) -> list[str]:
    aa = statistics.median(_over(two["full_again"], two["full"]))
    lines = [
        f"{_STAGES} real stages, {streams} stream{'s' * (streams > 1)}",
        f"{'missing KV':<22}{'tokens/s':>9}{'/full':>8}{'P/E[s]':>8}{'A/A':>7}{'one process':>13}",
    ]
    for name in ("full", "fill", "recompute"):
        bound = 1.0 if name == "full" else _STAGES / _mean_stages(two[name])
        lines.append(
            f"{name:<22}{_speed(two[name]):>9.1f}{statistics.median(_over(two[name], two['full'])):>7.2f}x"
            f"{bound:>7.2f}x{aa:>7.3f}{_speed(one[name]):>13.1f}"
        )
    return lines


def _mean_stages(ran: Sequence[_Ran]) -> float:
    """Of four layers each; exits are after 2, 4 and 6."""
    passed = [1 if depth <= 4 else 2 for of in ran for depth in of.depths]
    return sum(passed) / len(passed)


def _speed(ran: Sequence[_Ran]) -> float:
    return statistics.median(len(of.depths) / of.seconds for of in ran)


def _over(ran: Sequence[_Ran], other: Sequence[_Ran]) -> list[float]:
    """Tokens per second over those of the same round."""
    return [len(own.depths) / own.seconds / (len(of.depths) / of.seconds) for own, of in zip(ran, other, strict=True)]
