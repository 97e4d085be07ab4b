"""What launches cost a simulation: from a file, estimated from a config's sizes, or measured on an open model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.config import Config
from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.costs import (
    ROW_SHARES,
    SegmentCosts,
    estimated_costs,
    read_costs,
)
from megatron_ee.inference.scheduling.report_table import MILLISECONDS, Unit
from megatron_ee.parallel.products import head_products, layer_products, positions_seen

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.inference.llm import LLM

PASSES = Unit("passes")
"""Of full depth, with one row: the unit of estimates."""
_ROUNDS = 5
_MEASURED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves.

    Attributes:
        costs: what launches take.
        weighed: what strategies weigh, as the engine has them do: what layers read, or, without sizes, `costs`.
        said: one line on where the costs come from.
    """

    costs: SegmentCosts
    weighed: SegmentCosts
    exits: tuple[int, ...]
    num_layers: int
    unit: Unit
    said: str

    @property
    def rate(self) -> str:
        """What throughput is called."""
        return "tokens/s" if self.unit is MILLISECONDS else "tokens a pass"


def machine_from_file(path: Path, config: Config | None = None) -> Machine:
    """
    Args:
        config: of the model that the costs have to be of.

    Raises:
        FieldError: see `read_costs`; or they are of other segments.
    """
    costs = read_costs(path)
    stops = tuple(stop for _, stop in costs.segments)
    if config is not None and (own := (*config.exits.layers, config.model.num_layers)) != stops:
        raise FieldError(f"{path}: segments", f"end after layers {list(stops)}, and the model's after {list(own)}")
    weighed = costs if config is None else machine_from_sizes(config).costs
    return Machine(costs, weighed, stops[:-1], stops[-1], MILLISECONDS, f"costs: {path}")


def machine_from_sizes(config: Config) -> Machine:
    """Layers and heads by their matrix products, which is what a launch of one row reads."""
    from megatron_ee.model.vocabulary import planned_vocab_size

    model, kind = config.model, _kind(config)
    seen = positions_seen(model, config.data.sequence_length, range(1, model.num_layers + 1))
    layer, row, vocab_size = layer_products(model, seen), ROW_SHARES[kind], planned_vocab_size(config)
    exits = tuple(config.exits.layers)
    heads = {of: head_products(model, config.exits.head_of(of), seen, vocab_size) for of in (*exits, model.num_layers)}
    whole = model.num_layers * layer + heads[model.num_layers]
    shares = {of: size / whole for of, size in heads.items()}
    costs = estimated_costs([layer / whole] * model.num_layers, exits, row, heads=shares)
    said = f"costs: estimated from sizes, each more row {row:.0%} of the first ({kind}); a pass is a token's full depth"
    return Machine(costs, costs, exits, model.num_layers, PASSES, said)


def machine_of(llm: "LLM", *, launch_rows: int) -> Machine:
    """Measured, on a CPU; on a GPU what its layers read."""
    import torch
    from bench_decode_costs import measured_costs
    from bench_decode_setup import Sizes

    model = llm.model
    num_layers = model.stage.model.num_layers
    if next(model.stage.parameters()).device.type != "cpu":
        raise FieldError("--costs", "costs are measured on a CPU alone: give a file")
    sizes = Sizes(min(launch_rows, _MEASURED_ROWS), new_tokens=64, cost_rounds=_ROUNDS)
    measured = measured_costs(model, sizes, llm.config.inference.exit.measure)
    heads = {**measured.asks, num_layers: measured.speaks[num_layers]}
    said = f"costs: measured on {torch.get_num_threads()} threads, up to {sizes.sequences} sequences"
    costs = SegmentCosts(measured.segments, heads, measured.stores)
    return Machine(costs, model.launch_costs, model.exits, num_layers, MILLISECONDS, said)


def _kind(config: Config) -> str:
    return "cuda" if config.device == "cuda" else "cpu"
