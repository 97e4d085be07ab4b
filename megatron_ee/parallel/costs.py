"""How long the parts of a model take: what layouts and fills are planned by, estimated from products or measured.

All durations are of one micro-batch on one rank of a stage, in one unit: multiply-adds where they are estimated,
seconds where tools/measure_costs.py has measured them. Only their ratios decide anything.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from megatron_ee.config import Config, ExitsConfig, HeadKind
from megatron_ee.errors import FieldError
from megatron_ee.parallel.chunks import Chunk, Layout
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.parallel.pipeline.simulate import StageCosts
from megatron_ee.parallel.products import (
    BACKWARD,
    core_attention_products,
    head_products,
    layer_products,
    mlp_products,
    positions_seen,
)

ESTIMATED = "estimated"
VERSION = 1  # of the file

# Fields that later releases added, and what a file of before was measured for.
_ADDED = {
    "model.qkv_bias": False,
    "model.qk_norm": False,
    "model.sliding_window": None,
    "model.sliding_window_layers": "all",
}

_DURATIONS = ("layer_forward", "layer_backward", "embedding_forward", "embedding_backward", "transfer")


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Durations of a model's parts.

    Attributes:
        layer_backward: with what it computes again, where activations are recomputed.
        exits: X of an exit with a head of that kind: forward and backward of head, projection and loss.
        transfer: from a send to the arrival of its message.
    """

    layer_forward: float
    layer_backward: float
    embedding_forward: float
    embedding_backward: float
    exits: Mapping[HeadKind, float]
    transfer: float = 0.0

    @property
    def layer(self) -> float:
        return self.layer_forward + self.layer_backward

    @property
    def embedding(self) -> float:
        return self.embedding_forward + self.embedding_backward


@dataclass(frozen=True, slots=True)
class ChunkCosts:
    """F, X, B and W of every chunk of every stage, `forward[stage][chunk]` and so on: a `Cost` for simulations.

    Attributes:
        backward: without W where there is any.
        weight: for plans with W.
    """

    forward: tuple[tuple[float, ...], ...]
    exit: tuple[tuple[float, ...], ...]
    backward: tuple[tuple[float, ...], ...]
    transfer: float = 0.0
    weight: tuple[tuple[float, ...], ...] | None = None

    def __call__(self, action: Action) -> float:
        durations = {Kind.F: self.forward, Kind.X: self.exit, Kind.B: self.backward, Kind.W: self.weight}[action.kind]
        assert durations is not None, f"{action} has no duration"
        return durations[action.stage][action.chunk]

    @property
    def per_stage(self) -> StageCosts:
        """Of each stage's chunks together."""
        forward, exits, backward = map(_sums, (self.forward, self.exit, self.backward))
        return StageCosts(forward, exits, backward, _sums(self.weight) if self.weight is not None else None)

    @property
    def totals(self) -> tuple[float, ...]:
        """F + X + B + W of each stage, all its chunks together."""
        stages = self.per_stage
        weight = stages.weight or (0.0,) * len(stages.forward)
        return tuple(map(sum, zip(stages.forward, stages.exit, stages.backward, weight, strict=True)))


def costs_of(config: Config, vocab_size: int) -> ModelCosts:
    """The durations that `parallel.costs` chooses.

    Raises:
        FieldError: see `read_costs`.
    """
    if config.parallel.costs == ESTIMATED:
        costs = estimated_costs(config, vocab_size)
    else:
        costs = read_costs(Path(config.parallel.costs), config, vocab_size)
    # where only exits are trained the layers just run forward
    return costs if config.training.trains == "all" else replace(costs, layer_backward=0.0, embedding_backward=0.0)


def estimated_costs(config: Config, vocab_size: int) -> ModelCosts:
    """In multiply-adds of matrix products. What has none costs nothing: the embedding's look-up, messages. Where some
    layers have windows, a layer costs what they do on average."""
    model, training, length = config.model, config.training, config.data.sequence_length
    share = training.micro_batch_size * length / config.parallel.tensor  # tokens, by the share of each product
    seen = _seen(config)
    return ModelCosts(
        layer_forward=share * layer_products(model, seen),
        layer_backward=share * _backward_products(config),
        embedding_forward=0.0,
        embedding_backward=0.0,
        exits={
            kind: share * (1 + BACKWARD) * head_products(model, kind, seen, vocab_size) for kind in get_args(HeadKind)
        },
    )


def weight_share(config: Config) -> float:
    """The share of a layer's backward, estimated or measured, that is W where a plan has any: of its matrices'
    products, one for each of the forward. Attention's core has no weights."""
    seen = _seen(config)
    matrices = layer_products(config.model, seen) - core_attention_products(config.model, seen)
    return matrices / _backward_products(config)


def chunk_costs(layout: Layout, exits: ExitsConfig, costs: ModelCosts, *, weights: float | None = None) -> ChunkCosts:
    """What every chunk of a layout costs.

    Args:
        weights: for plans with W, the `weight_share` of a layer's backward; None: W is part of B.
    """
    share = weights or 0.0

    def of_all(of_layer: float, of_embedding: float) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple((chunk.stop - chunk.start) * of_layer + chunk.has_embedding * of_embedding for chunk in chunks)
            for chunks in layout
        )

    def of_exits(chunk: Chunk) -> float:
        return sum(costs.exits[exits.head_of(layer)] for layer in chunk.exits)

    return ChunkCosts(
        of_all(costs.layer_forward, costs.embedding_forward),
        tuple(tuple(map(of_exits, chunks)) for chunks in layout),
        of_all((1 - share) * costs.layer_backward, costs.embedding_backward),
        costs.transfer,
        None if weights is None else of_all(share * costs.layer_backward, 0.0),
    )


def write_costs(path: Path, costs: ModelCosts, config: Config, vocab_size: int, *, device: str) -> None:
    """Write what was measured, in seconds, so that the file is whole or absent.

    Args:
        device: its name, for people who read the file.
    """
    content = {
        "version": VERSION,
        "device": device,
        "measured_for": _measured_for(config, vocab_size),
        "seconds": {**asdict(costs), "exits": dict(costs.exits)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def read_costs(path: Path, config: Config, vocab_size: int) -> ModelCosts:
    """What `write_costs` wrote, for this very model and these sizes.

    Raises:
        FieldError: there is no such file, it is damaged, or it was measured for something else, which is named.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise _field_error(path, f"is of format version {content['version']}; this release reads {VERSION}")
        measured_for, seconds = dict(content["measured_for"]), content["seconds"]
        durations = {name: _duration(seconds[name]) for name in _DURATIONS}
        measured_exits = {kind: _duration(value) for kind, value in seconds["exits"].items()}
        if durations["layer_forward"] + durations["layer_backward"] == 0:
            raise ValueError("a layer takes no time")
    except FileNotFoundError as error:
        raise _field_error(path, "does not exist; tools/measure_costs.py writes such files") from error
    except FieldError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _field_error(path, f"is no file of tools/measure_costs.py, or is damaged ({error})") from error
    _check_measured_for(path, measured_for, _measured_for(config, vocab_size))
    needed = {config.exits.head_of(layer) for layer in config.trained_exits}
    if lacking := sorted(needed - measured_exits.keys()):
        raise _field_error(path, f"was measured without exits.head = {', '.join(lacking)}: measure again")
    return ModelCosts(exits=measured_exits, **durations)


def _seen(config: Config) -> float:
    return positions_seen(config.model, config.data.sequence_length, range(1, config.model.num_layers + 1))


def _backward_products(config: Config) -> float:
    """Of a token in a layer's backward, with what it computes again."""
    model, training, seen = config.model, config.training, _seen(config)
    layer = layer_products(model, seen)
    of_module = {"core_attn": core_attention_products(model, seen), "mlp": mlp_products(model), "layernorm": 0}
    again = {
        "none": 0,
        "selective": sum(of_module[module] for module in set(training.recompute_modules)),
        "full": layer,
    }
    return BACKWARD * layer + again[training.recompute]


def _sums(durations: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    return tuple(map(sum, durations))


def _measured_for(config: Config, vocab_size: int) -> dict[str, Any]:
    """All that durations depend on, by the names of the config's fields."""
    model, training = config.model, config.training
    modules = f" of {', '.join(sorted(training.recompute_modules))}" if training.recompute == "selective" else ""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "ffn_hidden_size")
    added = config.model_dump(mode="json", include={"model": {name.removeprefix("model.") for name in _ADDED}})
    return {
        **{f"model.{name}": getattr(model, name) for name in names},
        **{f"model.{name}": value for name, value in added["model"].items()},
        "model.vocab_size": vocab_size,
        "data.sequence_length": config.data.sequence_length,
        "training.micro_batch_size": training.micro_batch_size,
        "training.precision": training.precision,
        "training.recompute": training.recompute + modules,
        "parallel.tensor": config.parallel.tensor,
    }


def _check_measured_for(path: Path, measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    measured = {**_ADDED, **measured}
    differences = [
        f"{name} = {measured.get(name)}, not {value}" for name, value in wanted.items() if measured.get(name) != value
    ]
    if differences:
        raise _field_error(path, f"was measured for {'; '.join(differences)}")


def _duration(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"a duration of {value!r}")
    return float(value)


def _field_error(path: Path, message: str) -> FieldError:
    return FieldError("parallel.costs", f"{path} {message}")
