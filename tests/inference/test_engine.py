"""Whatever the strategy, the arrivals, the aborts: each request says what it says alone, and leaves nothing behind."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.decoding import opened, request, texts_of
from helpers.drafts import weaken
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.parallel.mesh import Mesh

STRATEGIES = ["lockstep", "compaction", "rebatch"]
CAPACITY = 64
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.05},
    {"threshold": 0.04, "kv_policy": "fill", "max_pending": 3},
    {"thresholds": {2: 0.06, 5: 0.02}, "kv_policy": "propagate"},
    {"exits": (5,), "threshold": 0.05, "measure": "margin"},
    {"mode": "speculative", "draft_exit": 2, "draft_length": 3},
    {"mode": "speculative", "kv_policy": "fill"},
    {"mode": "sled"},
    {"mode": "dola", "dola": {"layers": (5,)}},
]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"repetition_penalty": 1.3}]


@pytest.fixture(scope="module", params=["norm", "block"])
def model(request: pytest.FixtureRequest, mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, head=request.param)
    weaken(stage, after=2, factor=0.5)
    return opened(stage)


def engine_of(model: OpenedModel, strategy: str, *, residents: int, chunk: int = 8, **scheduling: Any) -> Engine:
    params = SchedulingParams.model_validate({"strategy": strategy, **scheduling})
    planner = make_planner(params, model.launch_costs, model.depths, residents=residents, prefill_chunk=chunk)
    return Engine(Batch(model, slots=residents, capacity=CAPACITY, prefill_chunk=chunk), planner)


def requests_of(seed: int, count: int) -> list[Request]:
    numbers = random.Random(seed)
    return [
        request(
            [numbers.randrange(VOCAB_SIZE) for _ in range(numbers.choice([1, 3, 5, 20]))],
            ExitParams.model_validate(numbers.choice(MODES)),
            max_new_tokens=numbers.randint(1, 12),
            seed=numbers.randrange(1000),
            **numbers.choice(SAMPLING),
        )
        for _ in range(count)
    ]


def said(text: Sequence[Emission]) -> list[tuple[int, int]]:
    return [(emission.token, emission.exit_layer) for emission in text]


def assert_nothing_is_left(engine: Engine, residents: int) -> None:
    walk = engine.batch.walk
    assert engine.is_idle and engine.num_waiting == 0
    assert engine.batch.free_slots == residents
    assert engine.batch.fronts() == []
    for attention in walk.cache.windows:
        assert not walk.cache.of(attention).any(), "keys and values of nobody"


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_by_any_strategy_is_each_request_alone(model: OpenedModel, data: st.DataObject) -> None:
    requests = requests_of(
        data.draw(st.integers(0, 10**6), label="seed"), data.draw(st.integers(1, 9), label="requests")
    )
    residents = data.draw(st.integers(1, 6), label="residents")
    engine = engine_of(
        model,
        data.draw(st.sampled_from(STRATEGIES), label="strategy"),
        residents=residents,
        chunk=data.draw(st.sampled_from([1, 3, 8, 64]), label="prefill_chunk"),
        launch_rows=data.draw(st.integers(1, residents), label="launch_rows"),
        max_wait=data.draw(st.sampled_from([1, 3, 1000]), label="max_wait"),
    )
    arrivals = sorted(data.draw(st.integers(0, 30)) for _ in requests)
    aborts = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 40)), label="aborts")
    texts: dict[int, list[Emission]] = {}
    step = 0
    while len(texts) < len(requests) or not engine.is_idle:
        while len(texts) < len(requests) and arrivals[len(texts)] <= step:
            texts[engine.add(requests[len(texts)])] = []
        for number, when in aborts.items():
            if when == step:
                engine.abort(number)
        for number, emission in engine.step():
            texts[number].append(emission)
        step += 1
        assert step < 3000, "somebody waits for ever"
    assert_nothing_is_left(engine, residents)
    for number, of in enumerate(requests):
        (alone,) = texts_of(model, [of])
        ended = number not in aborts
        assert said(texts[number]) == said(alone[: len(texts[number])])
        assert not ended or len(texts[number]) == len(alone)


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
