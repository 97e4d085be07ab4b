"""Propagating: layers that a token skips get keys and values of the hidden state with which it left. Written out here,
position by position, with megatron-core's layers; and what it does to neighbours: nothing.

Shapes: S positions, T positions attended to, B sequences, G key-value heads, R query heads of each, D head dimension.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from helpers.decoding import decode, keys_and_values, opened, request, tokens_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.model.layers import Layer
from megatron_ee.model.rotary import Rotary, rotate
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

EXITS = [2, 5]
NUM_LAYERS = 8
HEADS = {"norms": "norm", "MLP and block": ["mlp", "block"]}


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    fields = {"qk_norm": True, "qkv_bias": True}
    return opened(whole_model(mesh, exits=EXITS, dtype=torch.float64, head=HEADS[request.param], model=fields))


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Text:
    """One sequence, and the keys and values [T, 1, G, D] of each attention: a `KeyValueStore`."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._rotary = stage, Rotary(stage.model)
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._length = 0

    def extend(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if layer in self.kept:
            both = zip(self.kept[layer], (key_SBGD, value_SBGD), strict=True)
            key_SBGD, value_SBGD = (torch.cat(parts) for parts in both)
        self.kept[layer] = key_SBGD, value_SBGD
        return (
            key_SBGD,
            value_SBGD,
            torch.ones(self._length, len(key_SBGD), dtype=torch.bool).tril(len(key_SBGD) - self._length),
        )

    @torch.no_grad()
    def feed(self, tokens: Sequence[int], thresholds: Mapping[int, float]) -> tuple[int, int]:
        """The next token, by the exit that the last of these leaves at, and that exit's layer."""
        stage, past = self._stage, len(self.kept[1][0]) if self.kept else 0
        positions = torch.arange(past, past + len(tokens))
        self._length = len(tokens)
        x_SBH = stage.embed(torch.tensor([tokens]))
        for start, stop in pairwise((0, *EXITS, NUM_LAYERS)):
            x_SBH, taps = stage.run_layers(x_SBH, positions, start, stop, store=self)
            features_SBH = stage.exit_features(taps[stage.tap_of(stop)], stop, positions, store=self)
            logits_V = stage.project(features_SBH, stop)[-1, 0]
            if stop == NUM_LAYERS or float(logits_V.softmax(-1).max()) >= thresholds.get(stop, 1.0):
                break
        for number in range(stop + 1, NUM_LAYERS + 1):
            self._propagate(stage.layers[str(number)], number, x_SBH, positions)
        for exit_layer in EXITS:
            if exit_layer > stop and stage.head(exit_layer).attends:
                self._propagate(stage.head(exit_layer).block, NUM_LAYERS + exit_layer, x_SBH, positions)
        return int(logits_V.argmax()), stop

    def _propagate(self, layer: Layer, number: int, x_SBH: torch.Tensor, positions: torch.Tensor) -> None:
        attention = layer.self_attention
        qkv_SBI, _ = attention.linear_qkv(layer.input_layernorm(x_SBH))
        qkv_SBGXD = qkv_SBI.unflatten(-1, (attention.num_query_groups_per_partition, -1, layer.config.kv_channels))
        key_SBGD, value_SBGD = attention.k_layernorm(qkv_SBGXD[..., -2, :]), qkv_SBGXD[..., -1, :]
        self.extend(number, rotate(key_SBGD, self._rotary.at(positions, x_SBH.dtype)), value_SBGD)


@torch.no_grad()
def _thresholds(model: OpenedModel) -> dict[int, float]:
    """At which about half of the tokens leave."""
    stage, positions = model.stage, torch.arange(40)
    _, taps = stage.run_layers(stage.embed(torch.tensor([_tokens(40, seed=9)])), positions, 0, NUM_LAYERS)
    thresholds = {}
    for layer in EXITS:
        ascending = stage.exit_logits(taps[stage.tap_of(layer)], layer, positions).softmax(-1).amax(-1).sort(0).values
        thresholds[layer] = float(ascending[19:21].mean())
    return thresholds


@pytest.mark.parametrize("chunk", [3, 512])
def test_skipped_layers_get_keys_and_values_of_the_state_that_left(model: OpenedModel, chunk: int) -> None:
    """Whatever chunks a prompt is read in: all of it but its last token is read at full depth."""
    thresholds = _thresholds(model)
    params = ExitParams(thresholds=thresholds, kv_policy="propagate")
    requests = [request(_tokens(length, seed=length), params) for length in (1, 8, 5)]
    batch = Batch(model, slots=3, capacity=32, prefill_chunk=chunk)
    texts = decode(batch, requests)
    for slot, (of, text) in enumerate(zip(requests, texts, strict=True)):
        naive, said = Text(model.stage), []
        if len(of.prompt) > 1:
            naive.feed(of.prompt[:-1], {})
        token = of.prompt[-1]
        for _ in text:
            token, layer = naive.feed([token], thresholds)
            said.append((token, layer))
        assert [(emission.token, emission.exit_layer) for emission in text] == said
        _assert_kept(model, batch, slot, naive)
    used = {emission.exit_layer for text in texts for emission in text}
    assert used == {*EXITS, NUM_LAYERS}, "the case is to mix depths"


def _assert_kept(model: OpenedModel, batch: Batch, slot: int, naive: Text) -> None:
    """All positions but the last, of which nothing is needed any more."""
    for number, (key_TBGD, value_TBGD) in naive.kept.items():
        count = len(key_TBGD) - 1
        if number > NUM_LAYERS and not model.runner.attends(number - NUM_LAYERS):
            continue
        for ours_GTD, theirs_TBGD in zip(
            batch.walk.cache.read(number, slot, count), (key_TBGD, value_TBGD), strict=True
        ):
            expected_GTD = theirs_TBGD[:count, 0].transpose(0, 1)
            torch.testing.assert_close(ours_GTD, expected_GTD, atol=1e-10, rtol=0, msg=f"attention {number}")


def test_nothing_is_ever_pending_and_no_deep_layer_runs_twice(model: OpenedModel) -> None:
    """That is the arithmetic that it saves; and it shows: keys and values are not those of full depth."""
    params = ExitParams(thresholds=_thresholds(model), kv_policy="propagate")
    prompts = [_tokens(length, seed=length) for length in (4, 9)]
    batch = Batch(model, slots=2, capacity=32)
    slots = [batch.add(request(prompt, params, max_new_tokens=12)) for prompt in prompts]
    texts: dict[int, list[tuple[int, int]]] = {slot: [] for slot in slots}
    for step in range(12):
        for slot, emission in batch.step():
            texts[slot].append((emission.token, emission.exit_layer))
        assert step == 11 or all(batch.walk.ledger.pending(slot) == 0 for slot in slots)
    depths = [layer for text in texts.values() for _, layer in text]
    assert 0 < depths.count(NUM_LAYERS) < len(depths), "the case is to mix depths"
    assert batch.walk.work.rows[5, NUM_LAYERS] == depths.count(NUM_LAYERS)
    tokens = [*prompts[0], *(token for token, _ in texts[slots[0]])][:-2]
    exact_GTD = keys_and_values(model.stage, tokens)[NUM_LAYERS][0]
    assert not torch.allclose(batch.walk.cache.read(NUM_LAYERS, slots[0], len(tokens))[0], exact_GTD, atol=1e-3)


@pytest.mark.parametrize("policy", ["recompute", "fill"])
def test_neighbours_that_propagate_change_nothing(model: OpenedModel, policy: str) -> None:
    thresholds = _thresholds(model)
    exact = ExitParams.model_validate({"thresholds": thresholds, "kv_policy": policy})
    propagating = ExitParams(thresholds=thresholds, kv_policy="propagate")
    batch = Batch(model, slots=4, capacity=32)
    requests = [request(_tokens(3 + number, seed=number), exact if number % 2 else propagating) for number in range(4)]
    texts = decode(batch, requests)
    for of, text in zip(requests, texts, strict=True):
        (alone,) = decode(Batch(model, slots=1, capacity=32), [of])
        assert [(of.token, of.exit_layer) for of in alone] == [(of.token, of.exit_layer) for of in text]
    batch.flush([1, 3])
    for slot in (1, 3):
        tokens = [*requests[slot].prompt, *tokens_of(texts[slot])][:-1]
        expected = keys_and_values(model.stage, tokens)
        for number in range(1, NUM_LAYERS + 1):
            for ours_GTD, theirs_GTD in zip(
                batch.walk.cache.read(number, slot, len(tokens)), expected[number], strict=True
            ):
                torch.testing.assert_close(ours_GTD, theirs_GTD, atol=1e-10, rtol=0)
