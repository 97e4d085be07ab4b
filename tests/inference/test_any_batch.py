"""Any batch: whatever rules its requests have and whenever they join and leave, each request's tokens and depths are
those that one pass without a cache says, drafts or none, and its keys and values, once flushed, those of full depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.confidences import leaves_at, said_at_exits
from helpers.decoding import decode, keys_and_values, opened, tokens_of
from helpers.drafts import weaken
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import MEASURES
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.parallel.mesh import Mesh

CAPACITY = 24
MAX_PENDING = 12
HEADS = ("norm", "mlp", "block")
WINDOWS = {"sliding_window": 3, "sliding_window_layers": [1, 3, 6], "qk_norm": True}
KV_POLICIES = ("recompute", "fill", "propagate")


@dataclass(frozen=True)
class Visit:
    """A request's stay in a batch: from which step on it may join, and after how many tokens it has to leave."""

    request: Request
    joins: int
    leaves: int


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _model(data: st.DataObject, mesh: Mesh) -> OpenedModel:
    exits = sorted(data.draw(st.sets(st.integers(1, 7), min_size=1, max_size=3), label="exits"))
    heads = [data.draw(st.sampled_from(HEADS), label="head") for _ in exits]
    fields = data.draw(st.sampled_from([{}, WINDOWS]), label="model")
    gates = ["linear"] * len(exits)
    stage = whole_model(mesh, exits=exits, dtype=torch.float64, head=heads, gate=gates, model=fields)
    weaken(stage, after=exits[0], factor=data.draw(st.sampled_from([1.0, 0.3]), label="layers above the first exit"))
    return opened(stage)


def _exit_params(data: st.DataObject, model: OpenedModel) -> ExitParams:
    """Thresholds are confidences that some share of tokens reaches, so that depths mix."""
    measure = data.draw(st.sampled_from(list(MEASURES)), label="measure")
    said = said_at_exits(model.stage, _tokens(20), model.exits)
    thresholds: dict[int, float] = {}
    for layer in model.exits:
        share = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]), label="share that stays")
        confidences = sorted(said[layer].confidence(measure, position) for position in range(20))
        thresholds[layer] = share if share in (0.0, 1.0) else sum(confidences[int(20 * share) - 1 :][:2]) / 2
    fields: dict[str, Any] = {"measure": measure, "thresholds": thresholds}
    fields["mode"] = data.draw(st.sampled_from(["early_exit"] * 6 + ["speculative"] * 5 + ["full"]), label="mode")
    fields["min_exit"] = data.draw(st.sampled_from([0, 0, 0, 4]), label="min_exit")
    fields["patience"] = data.draw(st.sampled_from([1, 1, 1, 2]), label="patience")
    fields["kv_policy"] = data.draw(st.sampled_from(KV_POLICIES), label="kv_policy")
    fields["max_pending"] = data.draw(st.integers(1, MAX_PENDING), label="max_pending")
    if fields["mode"] == "speculative":
        fields |= _draft_params(data, model, fields["max_pending"], fields["min_exit"])
    return ExitParams.model_validate(fields)


def _draft_params(data: st.DataObject, model: OpenedModel, most: int, min_exit: int) -> dict[str, Any]:
    chosen: list[Any] = ["auto"] if model.exits[-1] >= min_exit else []
    return {
        "draft_exit": data.draw(st.sampled_from([*model.exits, *chosen]), label="draft_exit"),
        "draft_length": data.draw(st.sampled_from([*range(1, most + 1), "auto"]), label="draft_length"),
        "draft_threshold": data.draw(st.sampled_from([0.0, 0.0, 0.03]), label="draft_threshold"),
    }


def _visit(data: st.DataObject, model: OpenedModel, number: int) -> Visit:
    new = data.draw(st.integers(1, 12), label="new tokens")
    temperature = data.draw(st.sampled_from([0.0, 0.0, 1.0]), label="temperature")
    sampling = SamplingParams(max_new_tokens=new, temperature=temperature, seed=number)
    prompt = _tokens(data.draw(st.integers(1, 11), label="prompt"), seed=number)
    joins, leaves = data.draw(st.integers(0, 6), label="joins"), data.draw(st.integers(1, 12), label="leaves")
    return Visit(Request(tuple(prompt), sampling, _exit_params(data, model)), joins, leaves)


def _is_exact(params: ExitParams) -> bool:
    """Drafts leave nothing behind that is not full depth's, whatever the policy of early exits is."""
    return params.kv_policy != "propagate" or params.mode == "speculative"


class Run:
    """Steps a batch; requests come and go as their visits say. What is left behind is checked when one goes."""

    def __init__(self, model: OpenedModel, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._inside: dict[int, tuple[int, Visit]] = {}
        self.texts: dict[int, list[Emission]] = {}

    def of(self, visits: Sequence[Visit]) -> None:
        waiting, step = dict(enumerate(visits)), 0
        while waiting or self._inside:
            for number in [number for number, visit in waiting.items() if visit.joins <= step]:
                if self._batch.free_slots:
                    visit = waiting.pop(number)
                    self._inside[self._batch.add(visit.request)] = number, visit
                    self.texts[number] = []
            for slot, emission in self._batch.step():
                self.texts[self._inside[slot][0]].append(emission)
            for slot, (number, visit) in list(self._inside.items()):
                finished = self.texts[number][-1].finish is not None
                if not finished:
                    self._assert_pending(slot, visit.request.exit)
                if finished or len(self.texts[number]) >= visit.leaves:
                    self._leave(slot, visit.request, self.texts[number])
            step += 1

    def _assert_pending(self, slot: int, params: ExitParams) -> None:
        limit = 0 if params.kv_policy == "propagate" or params.mode == "speculative" else params.max_pending
        assert self._batch.walk.ledger.pending(slot) <= limit

    def _leave(self, slot: int, request: Request, text: Sequence[Emission]) -> None:
        if _is_exact(request.exit):
            self._assert_exact(slot, [*request.prompt, *tokens_of(text)][:-1])
            self._batch.flush([slot])
            self._assert_exact(slot, [*request.prompt, *tokens_of(text)][:-1])
            assert self._batch.walk.ledger.pending(slot) == 0
        self._batch.remove(slot)
        del self._inside[slot]

    def _assert_exact(self, slot: int, tokens: Sequence[int]) -> None:
        """What the ledger says is there are keys and values of full depth."""
        walk, num_layers = self._batch.walk, self._model.stage.model.num_layers
        assert walk.ledger.length(slot) == len(tokens)
        expected = keys_and_values(self._model.stage, tokens)
        depths = [walk.ledger.depth_of(slot, position) for position in range(len(tokens))]
        there = {layer: sum(depth >= layer for depth in depths) for layer in range(1, num_layers + 1)}
        for layer in self._model.exits:
            if walk.ledger.has_block(slot, layer):
                assert walk.ledger.block_length(slot, layer) == there[layer]
                there[num_layers + layer] = there[layer]
        for number, count in there.items():
            for ours_GTD, theirs_GSD in zip(walk.cache.read(number, slot, count), expected[number], strict=True):
                torch.testing.assert_close(ours_GTD, theirs_GSD[:, :count], atol=1e-10, rtol=0)


@torch.no_grad()
def _assert_as_by_full_depth(model: OpenedModel, request: Request, text: Sequence[Emission]) -> None:
    said = said_at_exits(model.stage, [*request.prompt, *tokens_of(text)], model.exits)
    for number, emission in enumerate(text):
        position = len(request.prompt) + number - 1
        layer, confidence = leaves_at(said, position, request.exit, model.exits)
        assert emission.exit_layer == layer
        assert emission.confidence == pytest.approx(confidence, abs=1e-6)
        if request.sampling.temperature == 0:
            assert emission.token == said[layer].choice(position)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_request_is_what_it_is_alone_and_keys_and_values_are_exact(mesh: Mesh, data: st.DataObject) -> None:
    model = _model(data, mesh)
    visits = [_visit(data, model, number) for number in range(data.draw(st.integers(1, 5), label="requests"))]
    slots, chunk = data.draw(st.integers(1, 4), label="slots"), data.draw(st.integers(1, 12), label="prefill_chunk")
    run = Run(model, Batch(model, slots=slots, capacity=CAPACITY, max_pending=MAX_PENDING, prefill_chunk=chunk))
    run.of(visits)
    for number, visit in enumerate(visits):
        text = run.texts[number]
        if _is_exact(visit.request.exit):
            _assert_as_by_full_depth(model, visit.request, text)
        if not _is_exact(visit.request.exit) or visit.request.sampling.temperature > 0:
            (alone,) = decode(Batch(model, slots=1, capacity=CAPACITY), [visit.request])
            assert [(of.token, of.exit_layer) for of in alone[: len(text)]] == [
                (of.token, of.exit_layer) for of in text
            ]
    depths = {emission.exit_layer for text in run.texts.values() for emission in text}
    event(f"depths: {len(depths)}")
    event(f"drafts accepted: {any(emission.drafted for text in run.texts.values() for emission in text)}")


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_what_overflowed_in_a_slot_does_not_reach_the_next_sequence(mesh: Mesh, policy: str) -> None:
    """Beside a longer neighbour its attention masks out positions that the earlier sequence had."""
    model = opened(whole_model(mesh, exits=[2, 5], dtype=torch.float64))
    params = ExitParams.model_validate({"threshold": 0.025, "kv_policy": policy})
    long, earlier, next_ = (
        Request(tuple(_tokens(length, seed=length)), SamplingParams(max_new_tokens=8), params) for length in (12, 9, 2)
    )
    batch = Batch(model, slots=2, capacity=CAPACITY)
    batch.add(long)
    slot = batch.add(earlier)
    for _ in range(2):
        batch.step()
    for number in batch.walk.cache.windows:
        for part_GTD in batch.walk.cache.read(number, slot, batch.walk.ledger.length(slot)):
            part_GTD.fill_(torch.nan)
    batch.remove(slot)
    assert batch.add(next_) == slot
    text = [emission for _ in range(6) for of, emission in batch.step() if of == slot]
    (alone,) = decode(Batch(model, slots=1, capacity=CAPACITY), [next_])
    assert [(of.token, of.exit_layer) for of in text] == [(of.token, of.exit_layer) for of in alone[:6]]
