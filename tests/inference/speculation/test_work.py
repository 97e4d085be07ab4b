"""No layer runs twice for any position, and no head that the law does not know: a cycle that drafts d tokens at exit E
has d + 1 rows in layers 1 to E, d at the head there, d + 1 rows in the other layers and d + 1 at the final head."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.decoding import opened, request
from helpers.drafts import drafting, prompts, successors, table_model, weaken
from helpers.models import whole_model

from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.inference.speculation.costs import CALLS, draft_costs
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

FULL = ExitParams(mode="full")


@pytest.fixture(params=["norm", "block"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, head=request.param)
    weaken(stage, after=2, factor=0.4)
    return opened(stage)


def _step(model: OpenedModel, batch: Batch) -> tuple[list[tuple[int, Emission]], Work, Work]:
    """What a step has emitted and run: in layers, and in heads."""
    layers, heads = batch.walk.work + Work(), model.runner.work + Work()
    emitted = batch.step()
    return emitted, batch.walk.work - layers, model.runner.work - heads


def _over_layers(rows: Counter[tuple[int, int]]) -> list[int]:
    """Rows of each layer."""
    return [sum(count for (start, stop), count in rows.items() if start < layer <= stop) for layer in range(1, 9)]


@pytest.mark.parametrize("layer", [2, 5])
@pytest.mark.parametrize("length", [1, 4])
def test_a_cycle_runs_what_the_law_says(model: OpenedModel, layer: int, length: int) -> None:
    """Whatever is accepted, and beside rows at full depth; every launch and every head serves all rows at once."""
    params, num_drafting, num_plain = drafting(draft_exit=layer, draft_length=length), 3, 2
    batch = Batch(model, slots=5, capacity=64)
    for number, prompt in enumerate(prompts(5)):
        batch.add(request(prompt, params if number < num_drafting else FULL, max_new_tokens=50))
    batch.step()
    accepted = set()
    for _ in range(6):
        emitted, layers, heads = _step(model, batch)
        tokens = Counter(slot for slot, _ in emitted)
        accepted |= {tokens[slot] - 1 for slot in range(num_drafting)}
        rows = num_drafting * (length + 1)
        assert _over_layers(layers.rows) == [rows + num_plain] * 8
        assert _over_layers(layers.launches) == [length + 1] * layer + [1] * (8 - layer)
        assert (layers.drafts, layers.drafted) == (length, num_drafting * length)
        assert (layers.rounds, layers.turns) == (1, 5)
        assert layers.taken_back == rows - sum(tokens[slot] for slot in range(num_drafting))
        assert heads.projected == {layer: num_drafting * length, 8: rows + num_plain}
        assert heads.projections == {layer: length, 8: 1}
    assert len(accepted) > 1, "drafts are to end in different places"


def test_a_draft_that_the_exit_ends_is_verified_as_far_as_it_came(random_model: OpenedModel) -> None:
    """The exit was asked once more than it drafted."""
    batch = Batch(random_model, slots=1, capacity=64)
    batch.add(request([5, 6], drafting(draft_exit=2, draft_length=6, draft_threshold=0.045), max_new_tokens=60))
    batch.step()
    asked = set()
    for _ in range(12):
        _, layers, heads = _step(random_model, batch)
        asked.add(layers.drafted)
        is_whole = heads.projected[8] == layers.drafted + 1
        assert is_whole == (layers.drafts == 6 and heads.projected[8] == 7)
        assert _over_layers(layers.rows) == [heads.projected[8]] * 8
        assert heads.projected[2] == layers.drafted == layers.drafts
    assert len(asked) > 2


def test_a_text_runs_each_position_once_but_for_what_is_taken_back(model: OpenedModel) -> None:
    requests = [request(prompt, drafting(draft_length=3), max_new_tokens=20) for prompt in prompts(4)]
    batch = Batch(model, slots=4, capacity=64, prefill_chunk=4)
    texts: dict[int, list[Emission]] = {batch.add(of): [] for of in requests}
    while any(not text or text[-1].finish is None for text in texts.values()):
        for slot, emission in batch.step():
            texts[slot].append(emission)
    work = batch.walk.work
    kept = sum(len(of.prompt) + 20 - 1 for of in requests)
    discarded = sum(emission.discarded for text in texts.values() for emission in text)
    assert _over_layers(work.rows) == [kept + work.taken_back] * 8
    assert work.taken_back == discarded > 0


@pytest.mark.parametrize("head", ["norm", "mlp", "block"])
def test_costs_are_what_a_cycle_reads(mesh: Mesh, head: str) -> None:
    """In bytes of weights: of what the work above counts, each launch once. Calls cost as much as so many bytes."""
    model = opened(whole_model(mesh, exits=[2, 5], head=head))
    weights = model.facts.weights
    for layer, costs in draft_costs(model.facts, model.exits, "cpu").items():
        batch = Batch(model, slots=1, capacity=32)
        batch.add(request([1, 2], drafting(draft_exit=layer, draft_length=3), max_new_tokens=20))
        batch.step()
        _, layers, heads = _step(model, batch)
        read = sum(count * sum(weights.layers[start:stop]) for (start, stop), count in layers.launches.items())
        read += sum(count * weights.projections[of] for of, count in heads.projections.items())
        read += sum(count * weights.features[of] for of, count in heads.features.items())
        called = CALLS["cpu"] * sum(count * (stop - start) for (start, stop), count in layers.launches.items())
        assert replace(costs, row=0.0, several=0.0).cycle(3) == read + called
        assert costs.several == CALLS["cpu"] * (8 - layer) / 2
        assert 0 < costs.row < 0.2 * (costs.deep - costs.several)


def test_drafts_are_verified_together_wherever_they_end(mesh: Mesh) -> None:
    """One at its length, one at a stop token, one where the exit is not sure, beside a token at full depth: in one
    launch, which is one round, whether the last token of a draft has still to enter or not."""
    drafted_VV = 9 * successors()
    drafted_VV[13] = 0.0
    model = table_model(mesh, drafted_VV, successors())
    sure = drafting(draft_length=4, draft_threshold=0.5, kv_policy="fill")
    for order in ([0, 20, 10, 30], [10, 30, 20, 0], [20, 0, 10, 30]):
        batch = Batch(model, slots=4, capacity=64)
        for first in order:
            params = FULL if first == 30 else sure
            batch.add(request([first], params, max_new_tokens=50, stop_token_ids=(23,) if first == 20 else ()))
        batch.step()
        emitted, layers, heads = _step(model, batch)
        assert Counter(order[slot] for slot, _ in emitted) == {0: 5, 20: 2, 10: 3, 30: 1}
        assert layers.launches[2, 8] + layers.launches[0, 8] == 1
        assert (layers.rounds, layers.turns) == (1, 4)
        assert heads.projected[8] == 5 + 2 + 3 + 1
