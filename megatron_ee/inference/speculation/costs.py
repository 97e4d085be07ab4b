"""What drafting costs, estimated from what it reads: decoding few rows is bound by reading weights."""

from collections.abc import Mapping, Sequence

from megatron_ee.inference.savings import weights_of
from megatron_ee.inference.speculation.law import DraftCosts
from megatron_ee.model.stage import Stage

_ROW = {"cpu": 0.05, "cuda": 0.0}
"""What each more row adds to a launch, as a share of its first one."""


def draft_costs(stage: Stage, exits: Sequence[int]) -> Mapping[int, DraftCosts]:
    """Of each exit, in bytes."""
    weights, num_layers = weights_of(stage), stage.model.num_layers
    row = _ROW[next(stage.parameters()).device.type]
    costs = {}
    for layer in exits:
        own = weights.features[layer]
        block = own if stage.head(layer).attends else 0  # it runs at every row, asked or not, for its keys and values
        shallow = sum(weights.layers[:layer]) + block
        deep = sum(weights.layers[layer:]) + weights.features[num_layers] + weights.projections[num_layers]
        head = own - block + weights.projections[layer]
        costs[layer] = DraftCosts(shallow, head, deep, row * deep)
    return costs
