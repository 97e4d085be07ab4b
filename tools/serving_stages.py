"""Where a simulated pipeline is cut, as options of a command line or the config say."""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from serving_load import whole

from megatron_ee.config import Config
from megatron_ee.config.checks_decoding import stage_problems
from megatron_ee.config.inference import DecodingParallelConfig
from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.stage_layout import decoding_work, stage_stops
from megatron_ee.parallel.balance import balance

_OPTIONS = ("stages", "stage_layers", "layout")


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    of = parser.add_argument_group("a pipeline; without options the config's inference.parallel")
    of.add_argument("--stages", type=whole(1), metavar="N", help="each in a process of its own")
    of.add_argument("--stage-layers", type=_layers, metavar="N,N,...", help="layers of each: 2,3,4,7")
    of.add_argument(
        "--layout", choices=("equal", "survival"), help="equal, or by how deep the load's tokens go (equal)"
    )


def check_stage_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *, has_config: bool) -> None:
    given = [name.replace("_", "-") for name in _OPTIONS if getattr(arguments, name) is not None]
    if arguments.recommend and given:
        parser.error(f"--{given[0]} does not go with --recommend, which knows one process")
    if arguments.stage_layers and arguments.layout:
        parser.error("--stage-layers and --layout both say where stages end")
    if arguments.stage_layers and arguments.stages not in (None, len(arguments.stage_layers)):
        parser.error(f"--stage-layers has {len(arguments.stage_layers)} stages, and --stages says {arguments.stages}")
    if arguments.layout and arguments.stages is None:
        parser.error("--layout cuts a pipeline: --stages says into how many")
    if arguments.stages and not arguments.stage_layers and not has_config:
        parser.error("stages are cut by a model's sizes: name a CONFIG or --checkpoint, or give --stage-layers")


def stops_of(
    arguments: argparse.Namespace, config: Config | None, load: Sequence[SimulatedRequest], num_layers: int
) -> tuple[int, ...]:
    """The layer that each stage ends with.

    Raises:
        FieldError: they do not fit the model.
    """
    if arguments.stage_layers:
        if (layers := sum(arguments.stage_layers)) != num_layers:
            raise FieldError("--stage-layers", f"add up to {layers}, and the model has {num_layers} layers")
        return tuple(accumulate(arguments.stage_layers))
    if config is None:
        return (num_layers,)
    from megatron_ee.model.vocabulary import planned_vocab_size

    vocab_size = planned_vocab_size(config)
    if arguments.stages is None:
        return stage_stops(config.model, config.exits, config.inference, vocab_size)
    for _, message in stage_problems(DecodingParallelConfig(pipeline=arguments.stages), num_layers):
        raise FieldError("--stages", message)
    tokens = {num_layers: 1}
    if arguments.layout == "survival":
        tokens = dict(Counter(depth for of in load for depth in of.depths))
    work = decoding_work(config.model, config.exits, config.inference.exit, vocab_size, tokens)
    return tuple(accumulate(part.layers for part in balance(work, arguments.stages)))


def line_of(stops: Sequence[int]) -> str:
    """What the stages are."""
    starts = (0, *stops)
    return "stages: layers " + ", ".join(f"{start + 1} to {stop}" for start, stop in zip(starts, stops, strict=False))


def _layers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of layers")
    return tuple(int(part) for part in text.split(","))
