"""Whatever the strategy, the arrivals, the aborts: each request says what it says alone, and leaves nothing behind."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.decoding import keys_and_values, opened, request, texts_of
from helpers.drafts import weaken
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Failure, Request
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


def engine_of(
    model: OpenedModel,
    strategy: str,
    *,
    residents: int,
    chunk: int = 8,
    blocks: Blocks | None = None,
    whole: bool = True,
    keeps_prefixes: bool = False,
    **scheduling: Any,
) -> Engine:
    params = SchedulingParams.model_validate({"strategy": strategy, **scheduling})
    planner = make_planner(params, model.launch_costs, model.depths, residents=residents, prefill_chunk=chunk)
    batch = Batch(
        model,
        slots=residents,
        capacity=CAPACITY,
        prefill_chunk=chunk,
        blocks=blocks,
        keeps_prefixes=keeps_prefixes,
    )
    return Engine(batch, planner, whole=whole)


def requests_of(seed: int, count: int, *, longest: int = 12) -> list[Request]:
    """Many of whose prompts begin alike."""
    numbers = random.Random(seed)
    common = [numbers.randrange(VOCAB_SIZE) for _ in range(20)]
    return [
        request(
            common[: numbers.choice([0, 4, 9, 16])]
            + [numbers.randrange(VOCAB_SIZE) for _ in range(numbers.choice([1, 3, 5, 16]))],
            ExitParams.model_validate(numbers.choice(MODES)),
            max_new_tokens=numbers.randint(1, longest),
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
    assert walk.blocks.num_free == walk.blocks.num_positions
    assert all(not walk.blocks.of(slot) for slot in range(residents))
    kept = [block for block in range(walk.blocks.num_blocks) if walk.prefixes is not None and block in walk.prefixes]
    for attention in walk.cache.windows:
        room = walk.cache.of(attention)[..., : walk.blocks.num_positions, :].unflatten(3, (-1, walk.blocks.size))
        of_nobody = [block for block in range(walk.blocks.num_blocks) if block not in kept]
        assert not room[:, :, :, of_nobody].any(), "keys and values of nobody"
        assert not walk.cache.of(attention)[..., walk.blocks.num_positions :, :].any()


def assert_blocks_and_ledger_agree(engine: Engine) -> None:
    """At most one owner for each block; of every sequence all positions that have run have a place."""
    walk, inside = engine.batch.walk, {front.slot for front in engine.batch.fronts()}
    taken = [block for slot in range(walk.blocks.slots) for block in walk.blocks.of(slot)]
    assert len(taken) == len(set(taken)) == walk.blocks.num_blocks - walk.blocks.num_free // walk.blocks.size
    for slot in inside:
        assert walk.ledger.length(slot) <= walk.blocks.room(slot)
    assert all(not walk.blocks.of(slot) for slot in range(walk.blocks.slots) if slot not in inside)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_by_any_strategy_is_each_request_alone(model: OpenedModel, data: st.DataObject) -> None:
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


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_makes_way_says_the_same_in_the_end(model: OpenedModel, strategy: str) -> None:
    """Memory for two or three of them: many are paused in the middle, drafts and samples among them."""
    requests = requests_of(11, 16, longest=30)
    engine = engine_of(model, strategy, residents=8, blocks=Blocks(8, 60, 1), whole=False)
    numbers = [engine.add(of) for of in requests]
    texts: dict[int, list[Emission]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission)
        assert_blocks_and_ledger_agree(engine)
    assert engine.num_paused > 5
    assert_nothing_is_left(engine, 8)
    for number, of in zip(numbers, requests, strict=True):
        (alone,) = texts_of(model, [of])
        assert said(texts[number]) == said(alone), of


def test_the_first_are_never_paused(model: OpenedModel) -> None:
    """By priority, then by arrival: whoever comes before all others ends as if it were alone."""
    params = ExitParams(mode="full")
    engine = engine_of(model, "compaction", residents=4, blocks=Blocks(4, 32, 4), whole=False)
    late = [engine.add(request([1, 2, 3], params, max_new_tokens=20), priority=1) for _ in range(3)]
    engine.step()
    urgent = engine.add(request([4, 5], params, max_new_tokens=20))
    ends: list[int] = []
    steps = 0
    while not engine.is_idle:
        ends += [number for number, of in engine.step() if isinstance(of, Emission) and of.finish]
        steps += 1
        if urgent in ends and steps < 100:
            assert steps <= 21, "one launch to enter and one a token"
            steps = 100
    assert ends == [urgent, *late]
    assert engine.num_paused > 0


def test_nobody_is_taken_in_whose_longest_answer_may_not_fit(model: OpenedModel) -> None:
    engine = engine_of(model, "compaction", residents=4, blocks=Blocks(4, 32, 4))
    for _ in range(4):
        engine.add(request([1, 2, 3, 4], ExitParams(mode="full"), max_new_tokens=12))
    while not engine.is_idle:
        engine.step()
        assert engine.batch.free_slots >= 2, "two of them take 16 positions each"
    assert engine.num_paused == 0
    with pytest.raises(ValueError, match="4 \\+ 30 new tokens do not fit into 32 positions"):
        engine.add(request([1, 2, 3, 4], ExitParams(mode="full"), max_new_tokens=30))


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


@pytest.mark.parametrize("kv_policy", ["recompute", "fill", "propagate"])
def test_what_a_prompt_shares_with_another_is_not_run_again(model: OpenedModel, kv_policy: str) -> None:
    """But where another exit is asked that attends; and what of a prompt still waits at an exit when its text ends, has
    no keys and values beyond it."""
    params = ExitParams.model_validate({"threshold": 0.05, "kv_policy": kv_policy, "max_pending": 1})
    common = list(range(24))
    engine = engine_of(model, "compaction", residents=2, chunk=64, blocks=Blocks(2, 64, 4), keeps_prefixes=True)

    def serve(*requests: Request) -> tuple[list[list[Emission]], int]:
        """Their texts, and how many rows entered."""
        before = sum(rows for (start, _), rows in engine.batch.walk.work.rows.items() if start == 0)
        texts: dict[int, list[Emission]] = {engine.add(of): [] for of in requests}
        while not engine.is_idle:
            for number, emission in engine.step():
                assert isinstance(emission, Emission)
                texts[number].append(emission)
        entered = sum(rows for (start, _), rows in engine.batch.walk.work.rows.items() if start == 0)
        return list(texts.values()), entered - before

    first, second = (request([*common, last], params, max_new_tokens=2) for last in (40, 41))
    _, entered = serve(first)
    assert entered == 25 + 1
    (text,), entered = serve(second)
    assert entered == 25 - 24 + 1
    assert said(text) == said(texts_of(model, [second])[0])
    (text,), entered = serve(first)
    assert entered == 1 + 1, "the last token of a prompt is asked, whatever is known"
    assert said(text) == said(texts_of(model, [first])[0])
    attends = model.runner.attends(2)
    (text,), entered = serve(of := request([*common, 42], ExitParams(mode="full"), max_new_tokens=2))
    assert entered == (25 if attends else 1) + 1
    assert said(text) == said(texts_of(model, [of])[0])
    _, entered = serve(request(common[:10], ExitParams(mode="full"), max_new_tokens=2))
    assert entered == 10 - 8 + 1, "by whole blocks"
    short = request(common[::-1], ExitParams.model_validate({"threshold": 0.0}), max_new_tokens=1)
    assert serve(short)[1] == serve(short)[1] == 24, "it left at the first exit, and so did all of its prompt"


def test_what_is_no_number_is_never_taken_over(mesh: Mesh) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, model={"tie_embeddings": False})
    with torch.no_grad():
        assert stage.embedding is not None
        stage.embedding.weight[7] = torch.nan
    model = opened(stage)
    engine = engine_of(model, "compaction", residents=2, blocks=Blocks(2, 64, 4), keeps_prefixes=True)
    engine.add(request([1, 2, 3, 4, 7, 8, 9, 10, 11], ExitParams(mode="full")))
    while not engine.is_idle:
        engine.step()
    for attention in engine.batch.walk.cache.windows:
        assert engine.batch.walk.cache.of(attention).isfinite().all()
