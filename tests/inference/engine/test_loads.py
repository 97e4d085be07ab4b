"""Whatever the strategy, the arrivals, the aborts: each request says what it says alone, and leaves nothing behind."""

import random
from typing import Any

import pytest
import torch
from helpers.decoding import keys_and_values, opened, request, texts_of
from helpers.engines import (
    STRATEGIES,
    assert_blocks_and_ledger_agree,
    assert_nothing_is_left,
    engine_of,
    requests_of,
    said,
)
from helpers.models import whole_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Failure
from megatron_ee.parallel.mesh import Mesh


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_by_any_strategy_is_each_request_alone(model: OpenedModel, data: st.DataObject) -> None:
    _assert_each_request_is_as_alone(model, data)


@pytest.mark.slow
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hundreds_of_loads(model: OpenedModel, data: st.DataObject) -> None:
    _assert_each_request_is_as_alone(model, data)


def _assert_each_request_is_as_alone(model: OpenedModel, data: st.DataObject) -> None:
    requests = requests_of(
        data.draw(st.integers(0, 10**6), label="seed"), data.draw(st.integers(1, 9), label="requests")
    )
    residents = data.draw(st.integers(1, 6), label="residents")
    longest = max(len(of.prompt) + of.sampling.max_new_tokens - 1 for of in requests)
    engine = engine_of(
        model,
        data.draw(st.sampled_from(STRATEGIES), label="strategy"),
        residents=residents,
        chunk=data.draw(st.sampled_from([1, 3, 8, 64]), label="prefill_chunk"),
        launch_rows=data.draw(st.integers(1, residents), label="launch_rows"),
        max_wait=data.draw(st.sampled_from([1, 3, 1000]), label="max_wait"),
        blocks=Blocks(
            residents,
            data.draw(st.integers(longest, 3 * longest), label="positions"),
            data.draw(st.sampled_from([1, 3, 16]), label="block_size"),
        ),
        whole=data.draw(st.booleans(), label="whole"),
        keeps_prefixes=data.draw(st.booleans(), label="keeps_prefixes"),
    )
    priorities = [data.draw(st.integers(0, 2)) for _ in requests]
    arrivals = sorted(data.draw(st.integers(0, 30)) for _ in requests)
    aborts = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 40)), label="aborts")
    texts: dict[int, list[Emission]] = {}
    step = 0
    while len(texts) < len(requests) or not engine.is_idle:
        while len(texts) < len(requests) and arrivals[len(texts)] <= step:
            texts[engine.add(requests[len(texts)], priority=priorities[len(texts)])] = []
        for number, when in aborts.items():
            if when == step:
                engine.abort(number)
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission)
        assert_blocks_and_ledger_agree(engine)
        step += 1
        assert step < 3000, "somebody waits for ever"
    assert_nothing_is_left(engine, residents)
    for number, of in enumerate(requests):
        (alone,) = texts_of(model, [of])
        ended = number not in aborts
        assert said(texts[number]) == said(alone[: len(texts[number])])
        assert not ended or len(texts[number]) == len(alone)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_at_any_moment_the_cache_holds_what_the_ledger_says(model: OpenedModel, data: st.DataObject) -> None:
    """Keys and values of every position, up to where it has been, are those of its text in one pass at full depth; with
    sequences that were paused, and others that began with blocks that they found."""
    requests = requests_of(data.draw(st.integers(0, 10**6), label="seed"), 8)
    engine = engine_of(
        model,
        data.draw(st.sampled_from(STRATEGIES), label="strategy"),
        residents=5,
        blocks=Blocks(5, 70, data.draw(st.sampled_from([1, 3]), label="block_size")),
        whole=False,
        keeps_prefixes=True,
    )
    texts = {engine.add(of): list(of.prompt) for of in requests}
    for _ in range(data.draw(st.integers(1, 60), label="steps")):
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission.token)
    walk = engine.batch.walk
    for task in engine._inside.values():
        assert task.slot is not None
        if task.sequence.rule.kv_policy == "propagate" or not walk.ledger.length(task.slot):
            continue
        said_so_far = texts[task.number][: walk.ledger.length(task.slot)]  # drafts come after these
        expected = keys_and_values(model.stage, said_so_far)
        for number in range(1, model.stage.model.num_layers + 1):
            count = sum(walk.ledger.depth_of(task.slot, position) >= number for position in range(len(said_so_far)))
            for ours, theirs in zip(walk.cache.read(number, task.slot, count), expected[number], strict=True):
                torch.testing.assert_close(ours, theirs[:, :count], atol=1e-10, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_aborting_half_of_many_requests_leaves_no_residue(model: OpenedModel, strategy: str) -> None:
    requests, numbers = requests_of(7, 200), random.Random(1)
    engine = engine_of(model, strategy, residents=16, launch_rows=8)
    alive = {engine.add(of) for of in requests}
    doomed = set(numbers.sample(sorted(alive), 100))
    counts = dict.fromkeys(alive, 0)
    while not engine.is_idle:
        for number, _ in engine.step():
            assert number in alive, "aborted, and still speaks"
            counts[number] += 1
        if doomed and numbers.random() < 0.5:
            engine.abort(leaving := doomed.pop())
            alive.discard(leaving)
    for number in doomed & alive:
        engine.abort(number)  # it has ended: nothing happens
    assert_nothing_is_left(engine, 16)
    assert all(0 < counts[number] <= requests[number].sampling.max_new_tokens for number in alive - doomed)


def test_what_is_wrong_with_a_request_is_said_when_it_comes(model: OpenedModel) -> None:
    engine = engine_of(model, "compaction", residents=2)
    with pytest.raises(ValueError, match="do not fit into 64 positions"):
        engine.add(request([1] * 60, ExitParams(), max_new_tokens=9))
    assert engine.is_idle
    engine.abort(5)


def test_a_deadline_ends_a_request_wherever_it_is_and_nobody_else(model: OpenedModel) -> None:
    engine = engine_of(model, "rebatch", residents=2)
    of = request([1, 2], ExitParams(mode="full"), max_new_tokens=12)
    inside, other, waiting = engine.add(of, deadline=4.0), engine.add(of), engine.add(of, deadline=5.0)
    texts: dict[int, list[Emission | Failure]] = {inside: [], other: [], waiting: []}
    now = 0.0
    while not engine.is_idle:
        for number, said_now in engine.step(now):
            texts[number].append(said_now)
        now += 1.0
    for number in (inside, waiting):
        *tokens, last = texts[number]
        assert isinstance(last, Failure) and "deadline" in last.reason
        assert len(tokens) == (4 if number == inside else 1), "its place was free at 4"
    assert [of.token for of in texts[other] if isinstance(of, Emission)] == [
        of.token for of in texts_of(model, [of])[0]
    ]
    assert_nothing_is_left(engine, 2)


def test_who_has_no_token_to_choose_fails_alone(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, model={"tie_embeddings": False})
    with torch.no_grad():
        assert stage.embedding is not None
        stage.embedding.weight[7] = torch.nan
    model = opened(stage)
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "logit_bias": {7: -100.0}}
    good = [request([4, 5, 6], ExitParams(mode="full"), seed=number, **settings) for number in range(3)]
    engine = engine_of(model, "compaction", residents=4)
    numbers = [engine.add(of) for of in good]
    bad = engine.add(request([4, 7], ExitParams(mode="full")))
    texts: dict[int, list[Emission]] = {number: [] for number in numbers}
    failed: list[int] = []
    while not engine.is_idle:
        for number, of in engine.step():
            if isinstance(of, Failure):
                assert "no token can be chosen" in of.reason
                failed.append(number)
            else:
                texts[number].append(of)
    assert failed == [bad]
    for number, wanted in zip(numbers, good, strict=True):
        (alone,) = texts_of(model, [wanted])
        assert said(texts[number]) == said(alone)
    assert_nothing_is_left(engine, 4)
