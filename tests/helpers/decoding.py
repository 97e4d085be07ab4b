"""Decoding in tests: the tiny model opened, batches of requests, and what one pass without a cache says."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import MEASURES, Measure
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.model.stage import Stage
from megatron_ee.tokenizer import ByteTokenizer


class TinyTokenizer(ByteTokenizer):
    """Of no text: as many tokens as the tiny model has."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def opened(stage: Stage, *, measures: Mapping[str, Measure] = MEASURES, **more: Any) -> OpenedModel:
    """A whole model on one stage, ready to decode; it has no stop token."""
    exits = tuple(sorted(int(layer) for layer in stage.exits))[:-1]
    rows = stage.projection_weight(stage.model.num_layers).shape[0]
    return OpenedModel(stage, TinyTokenizer(rows), exits, measures, **more)


def request(prompt: Sequence[int], params: ExitParams, **sampling: Any) -> Request:
    return Request(tuple(prompt), SamplingParams.model_validate({"max_new_tokens": 16, **sampling}), params)


def decode(batch: Batch, requests: Sequence[Request]) -> list[list[Emission]]:
    """All tokens of requests that begin together; their slots stay taken, in order."""
    slots = [batch.add(of) for of in requests]
    texts: dict[int, list[Emission]] = {slot: [] for slot in slots}
    while any(not text or text[-1].finish is None for text in texts.values()):
        for slot, emission in batch.step():
            texts[slot].append(emission)
    return [texts[slot] for slot in slots]


def tokens_of(text: Sequence[Emission]) -> list[int]:
    return [emission.token for emission in text]


@torch.no_grad()
def full_logits(stage: Stage, tokens: Sequence[int], layer: int) -> torch.Tensor:
    """[S, V] at an exit, from one pass without a cache."""
    positions = torch.arange(len(tokens))
    _, taps = stage.run_layers(stage.embed(torch.tensor([tokens])), positions, 0, layer)
    return stage.exit_logits(taps[stage.tap_of(layer)], layer, positions).squeeze(1)
