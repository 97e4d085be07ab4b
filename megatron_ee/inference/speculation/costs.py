"""What drafting costs, estimated from what it reads: decoding few rows is bound by reading weights. The constants are
what `make bench-decode` measures."""

from collections.abc import Mapping, Sequence

from megatron_ee.inference.facts import ModelFacts
from megatron_ee.inference.scheduling.costs import ROW_SHARES
from megatron_ee.inference.speculation.law import DraftCosts

CALLS = {"cpu": 5_000_000, "cuda": 0}
"""What one row costs in a layer beside reading its weights: so many bytes could be read in the time that dozens of
small calls take. Those of several rows take half as long again. Where layers are large it does not matter."""


def draft_costs(facts: ModelFacts, exits: Sequence[int], device: str) -> Mapping[int, DraftCosts]:
    """Of each exit, in bytes.

    Args:
        device: its kind.
    """
    weights = facts.weights
    num_layers, row, calls = len(weights.layers), ROW_SHARES[device], CALLS[device]
    costs = {}
    for layer in exits:
        own = weights.features[layer]
        block = own if layer in facts.attending else 0  # it runs at every row, asked or not, for its keys and values
        shallow = sum(weights.layers[:layer]) + block
        head = own - block + weights.projections[layer]
        deep = sum(weights.layers[layer:]) + weights.features[num_layers] + weights.projections[num_layers]
        deep_calls = (num_layers - layer) * calls
        costs[layer] = DraftCosts(shallow + layer * calls, head, deep + deep_calls, row * deep, deep_calls / 2)
    return costs
