"""Decoding in tests: the tiny model opened, batches of requests, and what one pass without a cache says."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import MEASURES, Measure
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.model.masks import Window, decoding_masks
from megatron_ee.model.stage import Stage
from megatron_ee.tokenizer import ByteTokenizer


class TinyTokenizer(ByteTokenizer):
    """Of no text: as many tokens as the tiny model has."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def opened(stage: Stage, *, measures: Mapping[str, Measure] = MEASURES, **more: Any) -> OpenedModel:
    """A whole model on one stage, ready to decode; it has no stop token."""
    exits = tuple(sorted(int(layer) for layer in stage.exits))[:-1]
    vocab_size = stage.projection_weight(stage.model.num_layers).shape[0] * stage.tp_group.size()
    return OpenedModel(stage, TinyTokenizer(vocab_size), exits, measures, **more)


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


def texts_of(model: OpenedModel, requests: Sequence[Request]) -> list[list[Emission]]:
    """What a batch that holds nothing else makes of requests."""
    capacity = max(len(of.prompt) + of.sampling.max_new_tokens for of in requests)
    return decode(Batch(model, slots=len(requests), capacity=capacity), requests)


def served(model: OpenedModel, requests: Sequence[Request], slots: int, **more: Any) -> list[list[Emission]]:
    """The same of a batch that has fewer slots: a request joins when one before it has ended, and takes its slot."""
    capacity = max(len(of.prompt) + of.sampling.max_new_tokens for of in requests)
    batch = Batch(model, slots=slots, capacity=capacity, **more)
    waiting, inside = list(enumerate(requests)), dict[int, int]()
    texts: list[list[Emission]] = [[] for _ in requests]
    while waiting or inside:
        while waiting and batch.free_slots:
            number, of = waiting.pop(0)
            inside[batch.add(of)] = number
        for slot, emission in batch.step():
            texts[inside[slot]].append(emission)
        for slot in [slot for slot, number in inside.items() if texts[number][-1].finish is not None]:
            batch.remove(slot)
            del inside[slot]
    return texts


def tokens_of(text: Sequence[Emission]) -> list[int]:
    return [emission.token for emission in text]


@torch.no_grad()
def full_logits(stage: Stage, tokens: Sequence[int], layer: int) -> torch.Tensor:
    """[S, V] at an exit, from one pass without a cache."""
    positions = torch.arange(len(tokens), device=next(stage.parameters()).device)
    _, taps = stage.run_layers(stage.embed(positions.new_tensor([tokens])), positions, 0, layer)
    return stage.exit_logits(taps[stage.tap_of(layer)], layer, positions).squeeze(1)


class _Overheard:
    """A `KeyValueStore` that starts empty and keeps what it hears."""

    def __init__(self, windows: Mapping[int, Window], positions: torch.Tensor) -> None:
        self._masks, self._windows = decoding_masks(set(windows.values()), positions), windows
        self.heard: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key_GSD, value_GSD = (part[:, 0].transpose(0, 1) for part in (key_SBGD, value_SBGD))
        self.heard[layer] = key_GSD, value_GSD
        return key_SBGD, value_SBGD, self._masks[self._windows[layer]]


@torch.no_grad()
def keys_and_values(stage: Stage, tokens: Sequence[int]) -> Mapping[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of full depth, each [G, S, D], by the numbers of attentions, those of blocks in exit heads too: what
    `Stage.run_layers` makes of a text in one pass."""
    positions = torch.arange(len(tokens), device=next(stage.parameters()).device)
    store = _Overheard(stage.attention_windows, positions)
    num_layers = stage.model.num_layers
    x_SBH = stage.embed(positions.new_tensor([tokens]))
    _, taps = stage.run_layers(x_SBH, positions, 0, num_layers, store=store)
    for tap, hidden_SBH in taps.items():
        stage.exit_features(hidden_SBH, tap.layer, positions, store=store)
    return store.heard
