"""Where a model is cut into the stages of a decoding pipeline. Imports no torch.

A stage takes as long for a token as the weights that it reads for it, those of its layers and of the heads that are
asked there: decoding few rows is bound by that, and attention's keys and values count for nothing. Stages work at the
same time, on tokens of different texts, so the slowest one sets the pace.

**Survival.** Where each row costs what the first one does, and nothing is made up for what tokens skip (`propagate`),
what few tokens reach takes little time: of every layer and head, that share counts. With 16 layers of which .4, .2, .1
and .3 of the tokens leave after 4, 8, 12 and 16, four stages of four layers each are as slow as the first one, which
sees every token: 4 layers' time a token. Of 2, 3, 4 and 7 layers none takes more than 2.6, and 9.2 / 4 = 2.3 would be
ideal: 1.54 times as fast, of 1.74. Where a launch costs the same for one row and for many, the longest stage sets the
pace, and with exact policies every layer is run for every token: then equal stages are better.

An exit on a border belongs to the stage before it, since a token that leaves there has to come back at once.
"""

from collections.abc import Mapping, Set
from itertools import accumulate
from pathlib import Path

from megatron_ee.config import ExitParams, ExitsConfig, InferenceConfig, ModelConfig
from megatron_ee.config.checks_decoding import stage_problems
from megatron_ee.errors import FieldError
from megatron_ee.inference.exit_depths import read_depths
from megatron_ee.parallel.balance import Work, balance
from megatron_ee.parallel.products import head_products, layer_products

_WITHOUT_LOGITS = ("cosine", "gate")
"""Measures that look at no logits, so that an exit needs its projection only where a token leaves."""


def stage_stops(
    model: ModelConfig, exits: ExitsConfig, inference: InferenceConfig, vocab_size: int, *, calls: float = 0.0
) -> tuple[int, ...]:
    """The layer that each stage ends with, ascending; the last one is the model's.

    Args:
        model, exits, vocab_size: the checkpoint's.
        inference: its section `parallel` says how, its section `exit` which heads are asked.
        calls: see `decoding_work`.

    Raises:
        FieldError: the section doesn't fit the model; or see `read_depths`.
    """
    parallel = inference.parallel
    for field, message in stage_problems(parallel, model.num_layers):
        raise FieldError(field, message)
    if isinstance(parallel.layout, tuple):
        return tuple(accumulate(parallel.layout))
    tokens = {model.num_layers: 1}
    if parallel.layout == "survival":
        assert parallel.depths is not None, "it has been checked"
        tokens = read_depths(Path(parallel.depths), exits.layers, model.num_layers)
    work = decoding_work(model, exits, inference.exit, vocab_size, tokens, calls=calls)
    return tuple(accumulate(part.layers for part in balance(work, parallel.pipeline)))


def decoding_work(
    model: ModelConfig,
    exits: ExitsConfig,
    params: ExitParams,
    vocab_size: int,
    tokens: Mapping[int, int],
    *,
    calls: float = 0.0,
) -> Work:
    """What layers and heads read for a token, on average, in weights.

    Args:
        tokens: number of layers run -> tokens that came out there; one at least.
        calls: what a layer takes beside reading its weights, in weights that could be read meanwhile; of all ranks of
            a stage together, as they share the weights.
    """
    total, last = sum(tokens.values()), model.num_layers
    reach = [sum(count for layer, count in tokens.items() if layer >= depth) / total for depth in range(last + 1)]
    asked = _asked(params, exits.layers)
    of_layer = layer_products(model, seen=0) + calls
    return Work(
        layers=tuple(share * of_layer for share in reach[1:]),
        first=0.0,
        last=reach[last] * head_products(model, "norm", 0, vocab_size),
        exits={
            layer: (reach[layer] if layer in asked else tokens.get(layer, 0) / total)
            * head_products(model, exits.head_of(layer), 0, vocab_size)
            for layer in exits.layers
        },
        only_at_end=frozenset(exits.layers),
    )


def _asked(params: ExitParams, layers: tuple[int, ...]) -> Set[int]:
    """The exits whose heads are needed for every token that comes by."""
    needs_logits = params.measure not in _WITHOUT_LOGITS or params.patience > 1
    may_fire = params.may_fire(layers) if needs_logits else ()
    return {*may_fire, *params.may_draft(layers), *params.heard(layers)}
