"""Measure what layers and exits cost on this machine: measure_costs.py CONFIG [key.path=value ...] --output FILE

One process times real layers and exits, with the config's sizes and precision. Runs with `parallel.costs=FILE` are laid
out by it. Messages between stages are not measured: they count nothing.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, get_args

import torch

from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, ExitsConfig, HeadKind, ParallelConfig, open_config
from megatron_ee.device import Device, choose_device
from megatron_ee.errors import FieldError, UserError
from megatron_ee.log import quiet_dependencies
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.costs import ModelCosts, write_costs

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.model.stage import Stage
    from megatron_ee.training.stage_step import StageStep

ROUNDS = 25
WARM_UP = 5  # rounds that are dropped
LAYERS_MORE = 2  # of the longer chunk than of the shorter: what both have besides layers cancels out

KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
EXIT = "exit_"

Seconds = dict[str, list[float]]
"""Of every round, by what was timed."""
Value = TypeVar("Value")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_intermixed_args()
    quiet_dependencies()
    try:
        with open_config(arguments.config, arguments.overrides, read_model=read_model) as config:
            check(config, arguments.output)
            device = choose_device(config.device)
            print(device.reason)
            vocab_size = vocab_size_of(config)
            seconds = measure(config, vocab_size, device)
            costs = costs_from(seconds)
            name = device.gpu_name or "CPU"
            write_costs(arguments.output, costs, config, vocab_size, device=name)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(seconds, costs))
    print(f"written to {arguments.output}")
    return 0


def check(config: Config, output: Path) -> None:
    """
    Raises:
        FieldError: one process cannot measure this config, or the output cannot be written.
    """
    ranks = config.parallel.tensor
    if ranks > 1:
        raise FieldError("parallel.tensor", f"{ranks} ranks share each matrix, but costs are measured by one process")
    window, length = config.model.sliding_window, config.data.sequence_length
    if window is not None and window < length and config.model.sliding_window_layers != "all":
        raise FieldError("model.sliding_window_layers", "makes layers of two kinds, but costs are measured of one")
    if output.is_dir():
        raise FieldError("--output", f"{output} is a folder, not a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f".{output.name}.try").touch()
        output.with_name(f".{output.name}.try").unlink()
    except OSError as error:
        raise FieldError("--output", f"{output} cannot be written: {error.strerror}") from error


def vocab_size_of(config: Config) -> int:
    from megatron_ee.model.vocabulary import resolve_vocab_size
    from megatron_ee.tokenizer import open_tokenizer

    return resolve_vocab_size(config.model, open_tokenizer(config.data.tokenizer))


class Parts(NamedTuple):
    """A model just large enough: its config, and its chunks.

    All chunks have one layer, but the last, which has LAYERS_MORE more and the final exit, a norm. Each other kind of
    head that the config uses is at the end of one of them.
    """

    config: Config
    chunks: tuple[Chunk, ...]


def parts_of(config: Config) -> Parts:
    """What has to be built to measure a config."""
    heads = sorted({config.exits.head_of(layer) for layer in config.exits.layers} - {"norm"})
    start = max(1, len(heads))
    stop = start + 1 + LAYERS_MORE
    exits = tuple(range(1, len(heads) + 1))
    chunks = [Chunk(layer - 1, layer, (layer,) if layer in exits else ()) for layer in range(1, start + 1)]
    short = {
        "model": config.model.model_copy(update={"num_layers": stop}),
        "exits": config.exits.model_copy(
            update={"layers": exits, "weights": (1.0,) * len(exits), "head": tuple(heads), "projection": "shared"}
        ),
        "parallel": ParallelConfig(),
    }
    return Parts(config.model_copy(update=short), (*chunks, Chunk(start, stop, (stop,))))


def measure(config: Config, vocab_size: int, device: Device) -> Seconds:
    """Time everything ROUNDS times, in turns, so that what drifts hits all alike."""
    from megatron_ee.data.batch import Batch
    from megatron_ee.parallel.mesh import close_mesh, open_mesh
    from megatron_ee.parallel.pipeline.schedules import build_plan
    from megatron_ee.training.assemble import build_stage
    from megatron_ee.training.gradients import StageGradients
    from megatron_ee.training.losses import StepTokens
    from megatron_ee.training.stage_step import StageStep

    short, chunks = parts_of(config)
    mesh = open_mesh(short.parallel, device)
    stage = build_stage(short, (chunks,), vocab_size, mesh)
    gradients = StageGradients(stage, mesh, short.parallel)  # a backward adds to the gradients of training
    gradients.zero()
    shape = (1, config.training.micro_batch_size, config.data.sequence_length)
    tokens_MBS = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device.torch)
    batch = Batch(tokens_MBS, tokens_MBS, torch.ones(shape, device=device.torch))
    weights = dict.fromkeys((layer for chunk in chunks for layer in chunk.exits), 1.0)
    plan = build_plan("1f1b", num_stages=1, num_microbatches=1, has_exits=[True])  # says no more than that B will come
    tokens = StepTokens(tokens_MBS.numel())
    step = StageStep(stage, batch, plan, tokens, weights, exits=config.exits)
    seconds: Seconds = defaultdict(list)
    for number in range(WARM_UP + ROUNDS):
        once = _round(short.exits, stage, step, tokens_MBS[0], device)
        if number >= WARM_UP:
            for name, value in once.items():
                seconds[name].append(value)
    close_mesh()
    return seconds


def _round(
    exits: ExitsConfig, stage: "Stage", step: "StageStep", tokens_BS: torch.Tensor, device: Device
) -> dict[str, float]:
    """Seconds of everything once."""
    from megatron_ee.parallel.pipeline.plan import Action, Kind

    timed = partial(_timed, device)
    seconds: dict[str, float] = {}
    seconds["embedding_forward"], x_SBH = timed(partial(stage.embed, tokens_BS))
    gradient_SBH = torch.full_like(x_SBH, 1e-3)
    seconds["embedding_backward"], _ = timed(partial(torch.autograd.backward, x_SBH, gradient_SBH))
    of_layers = []
    for index, chunk in enumerate(stage.chunks):
        forward, exit_, backward = (Action(kind, 0, index, 0) for kind in (Kind.F, Kind.X, Kind.B))
        is_last = index == len(stage.chunks) - 1
        forward_seconds, _ = timed(partial(step.forward, forward, x_SBH.detach()))
        if chunk.exits:
            seconds[EXIT + exits.head_of(chunk.exits[0])], _ = timed(partial(step.exits, exit_))
        backward_seconds, _ = timed(partial(step.backward, backward, None if is_last else gradient_SBH))
        of_layers.append((forward_seconds, backward_seconds))
    (one_forward, one_backward), (more_forward, more_backward) = of_layers[0], of_layers[-1]
    seconds["layer_forward"] = (more_forward - one_forward) / LAYERS_MORE
    seconds["layer_backward"] = (more_backward - one_backward) / LAYERS_MORE
    return seconds


def costs_from(seconds: Seconds) -> ModelCosts:
    """Medians.

    Raises:
        UserError: the clock says that layers take no time.
    """
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    exits: dict[HeadKind, float] = {kind: medians.pop(EXIT + kind) for kind in KINDS if EXIT + kind in medians}
    if min(medians.values()) <= 0:
        raise UserError(f"the differences between {ROUNDS} rounds are all noise: measure again, on a machine at rest")
    return ModelCosts(**medians, exits=exits)


def table(seconds: Seconds, costs: ModelCosts) -> str:
    """Medians with the spread over rounds, and what exits cost in layers."""
    lines = [f"{'ms':<20}{'median':>10}{'10 %':>10}{'90 %':>10}{'layers':>10}"]
    for name in sorted(seconds):
        values = sorted(seconds[name])
        tenth, ninetieth = values[len(values) // 10], values[-1 - len(values) // 10]
        median = statistics.median(values)
        figures = "".join(f"{1e3 * value:>10.3f}" for value in (median, tenth, ninetieth))
        lines.append(f"{name.replace('_', ' '):<20}{figures}{median / costs.layer:>10.2f}")
    return "\n".join(lines)


def _timed(device: Device, work: Callable[[], Value]) -> tuple[float, Value]:
    """Seconds until all that the work submits is done, and what it returns."""
    device.synchronize()
    started = time.perf_counter()
    value = work()
    device.synchronize()
    return time.perf_counter() - started, value


if __name__ == "__main__":
    sys.exit(main())
