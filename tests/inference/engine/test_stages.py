"""A batch spread over the stages of a pipeline, here in one process: each request says what it says alone."""

import pytest
from helpers.decoding import request, texts_of
from helpers.engines import (
    STRATEGIES,
    engine_of,
    requests_of,
    said,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.inference.scheduling.fronts import LaunchPlan
from megatron_ee.inference.scheduling.strategies.named import make_planner

CUTS = [(2, 8), (4, 8), (5, 8), (3, 6, 8), (2, 5, 8), (1, 3, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8)]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_on_any_stages_is_each_request_alone(model: OpenedModel, data: st.DataObject) -> None:
    _assert_each_request_is_as_alone(model, data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hundreds_of_loads(model: OpenedModel, data: st.DataObject) -> None:
    _assert_each_request_is_as_alone(model, data)


def _assert_each_request_is_as_alone(model: OpenedModel, data: st.DataObject) -> None:
    requests = requests_of(
        data.draw(st.integers(0, 10**6), label="seed"), data.draw(st.integers(1, 9), label="requests")
    )
    residents = data.draw(st.integers(1, 6), label="residents")
    longest = max(len(of.prompt) + of.sampling.max_new_tokens - 1 for of in requests)
    scheduling = {}
    if data.draw(st.booleans(), label="limits"):
        scheduling = {"launch_rows": data.draw(st.integers(1, residents), label="launch_rows")}
    engine = engine_of(
        model,
        data.draw(st.sampled_from(STRATEGIES), label="strategy"),
        residents=residents,
        chunk=data.draw(st.sampled_from([1, 3, 8, 64]), label="prefill_chunk"),
        max_wait=data.draw(st.sampled_from([1, 3, 1000]), label="max_wait"),
        blocks=Blocks(
            residents,
            data.draw(st.integers(longest, 3 * longest), label="positions"),
            data.draw(st.sampled_from([1, 3, 16]), label="block_size"),
        ),
        whole=data.draw(st.booleans(), label="whole"),
        keeps_prefixes=data.draw(st.booleans(), label="keeps_prefixes"),
        stops=data.draw(st.sampled_from(CUTS), label="stops"),
        **scheduling,
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
            assert isinstance(emission, Emission)
            texts[number].append(emission)
        step += 1
        assert step < 9000, "somebody waits for ever"
    for number, of in enumerate(requests):
        (alone,) = texts_of(model, [of])
        ended = number not in aborts
        assert said(texts[number]) == said(alone[: len(texts[number])])
        assert not ended or len(texts[number]) == len(alone)


def test_who_was_paused_and_joins_anew_takes_nothing_of_before(model: OpenedModel) -> None:
    """Its rows are filled in on a deeper stage meanwhile, and it gets the same slot again."""
    of = request([3, 1, 4, 1, 5], ExitParams(threshold=0.0, kv_policy="fill"), max_new_tokens=6)
    batch = engine_of(model, "compaction", residents=1, stops=(2, 4, 8)).batch
    planner = make_planner(SchedulingParams(), model.launch_costs, (0, 2, 4, 8), residents=1, prefill_chunk=8)
    slot = batch.add(of)
    text = [emission for _, emission in batch.launch(batch.plan(planner, batch.fronts()))]
    flight = batch.depart(LaunchPlan(2, 4, {}, {slot: batch.ready(slot, 2, 4)}))
    assert batch.join(batch.pause(slot)) == slot
    assert batch.arrive(flight) == []
    while fronts := batch.fronts():
        text += [emission for _, emission in batch.launch(batch.plan(planner, fronts))]
    assert said([emission for emission in text if emission is not None]) == said(texts_of(model, [of])[0])
