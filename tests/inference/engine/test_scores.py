"""Prompts that are scored: by what one pass at full depth says, said once, and no other token is changed by it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.decoding import opened, request, texts_of
from helpers.engines import MODES, STRATEGIES, assert_nothing_is_left, engine_of, requests_of, said
from helpers.models import whole_model
from helpers.scores import assert_right, by_one_pass
from helpers.tiny import VOCAB_SIZE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference import scoring
from megatron_ee.inference.answers import Said, Scored, Silence
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Failure, Logprobs, Request, Scores
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.inference.wire import answers_in, answers_out, decode, encode
from megatron_ee.parallel.mesh import Mesh

STOPS = [(), (2, 8), (4, 8), (2, 5, 8), (1, 3, 4, 8)]
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_load_is_scored_as_by_one_pass(model: OpenedModel, data: st.DataObject) -> None:
    _assert_prompts_are_scored(model, data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hundreds_of_loads(model: OpenedModel, data: st.DataObject) -> None:
    _assert_prompts_are_scored(model, data)


def _assert_prompts_are_scored(model: OpenedModel, data: st.DataObject) -> None:
    requests = [
        replace(of, prompt_logprobs=data.draw(st.sampled_from([None, 0, 2, VOCAB_SIZE + 1])))
        for of in requests_of(data.draw(st.integers(0, 10**6), label="seed"), data.draw(st.integers(1, 7)), longest=8)
    ]
    residents = data.draw(st.integers(1, 5), label="residents")
    longest = max(len(of.prompt) + of.sampling.max_new_tokens - 1 for of in requests)
    engine = engine_of(
        model,
        data.draw(st.sampled_from(STRATEGIES), label="strategy"),
        residents=residents,
        chunk=data.draw(st.sampled_from([1, 3, 8, 64]), label="prefill_chunk"),
        blocks=Blocks(
            residents,
            data.draw(st.integers(longest, 3 * longest), label="positions"),
            data.draw(st.sampled_from([1, 3, 16]), label="block_size"),
        ),
        whole=data.draw(st.booleans(), label="whole"),
        keeps_prefixes=data.draw(st.booleans(), label="keeps_prefixes"),
        stops=data.draw(st.sampled_from(STOPS), label="stops"),
    )
    aborts = data.draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 20)), label="aborts")
    with patch.object(scoring, "_MOST_LOGITS", data.draw(st.sampled_from([1, 5 * VOCAB_SIZE, 1 << 24]))):
        replies = _served(engine, requests, aborts)
    assert_nothing_is_left(engine, residents)
    for number, of in enumerate(requests):
        text, whole = _text_of(replies[number]), number not in aborts
        _assert_scored(model, of, replies[number], whole=whole)
        (alone,) = texts_of(model, [of])
        assert said(text) == said(alone[: len(text)])
        assert not whole or len(text) == len(alone)


def _served(engine: Engine, requests: Sequence[Request], aborts: dict[int, int] | None = None) -> list[list[Any]]:
    """All that is said of each, in order."""
    replies: dict[int, list[Any]] = {engine.add(of): [] for of in requests}
    for step in range(5000):
        for number in [number for number, when in (aborts or {}).items() if when == step]:
            engine.abort(number)
        if engine.is_idle:
            return list(replies.values())
        for number, reply in engine.step():
            replies[number].append(reply)
    raise AssertionError("somebody waits for ever")


def _text_of(replies: Sequence[Any]) -> list[Emission]:
    return [of for of in replies if isinstance(of, Emission)]


def _assert_scored(model: OpenedModel, of: Request, replies: Sequence[Any], *, whole: bool = True) -> None:
    scores = [reply for reply in replies if isinstance(reply, Scores)]
    if of.prompt_logprobs is None:
        assert not scores, "nobody wanted any"
        return
    assert len(scores) == 1 or (not whole and not replies), "once, before anything else is said"
    if scores:
        assert replies[0] is scores[0]
        assert_right(scores[0], of, by_one_pass(model, of.prompt))


@pytest.mark.parametrize("mode", [*MODES, {"threshold": 0.0, "patience": 2}, {"threshold": 0.1, "measure": "cosine"}])
@pytest.mark.parametrize("stops", [(), (2, 5, 8)])
def test_scoring_takes_the_first_token_to_full_depth_and_changes_nothing_else(
    model: OpenedModel, mode: dict[str, Any], stops: tuple[int, ...]
) -> None:
    of = request(PROMPT, ExitParams.model_validate(mode), max_new_tokens=8, exit_logprobs=True)
    engine = engine_of(model, "compaction", residents=1, chunk=4, stops=stops)
    scored = replace(of, prompt_logprobs=2)
    (replies,) = _served(engine, [scored])
    _assert_scored(model, scored, replies)
    first, *others = _text_of(replies)
    if of.exit.mode != "early_exit":
        assert said([first, *others]) == said(texts_of(model, [of])[0])
        return
    assert (first.exit_layer, first.confidence, list(first.exit_logprobs or {})) == (8, 1.0, [8])
    if of.exit.kv_policy == "propagate":
        return
    longer = replace(of, prompt=(*PROMPT, first.token))
    assert said(others) == said(texts_of(model, [longer])[0][:7])


def test_exits_are_asked_again_after_the_prompt(model: OpenedModel) -> None:
    of = request(PROMPT, ExitParams(threshold=0.0), max_new_tokens=4)
    (replies,) = _served(engine_of(model, "compaction", residents=1), [replace(of, prompt_logprobs=0)])
    assert [emission.exit_layer for emission in _text_of(replies)] == [8, 2, 2, 2]
    assert [emission.exit_layer for emission in texts_of(model, [of])[0]] == [2] * 4


def test_one_token_has_no_scores_and_no_others_are_negative(model: OpenedModel) -> None:
    of = replace(request([5], ExitParams(mode="full"), max_new_tokens=1), prompt_logprobs=3)
    (replies,) = _served(engine_of(model, "compaction", residents=1), [of])
    assert replies[0] == Scores(()) and len(_text_of(replies)) == 1
    with pytest.raises(ValueError, match=r"request\.prompt_logprobs: -1"):
        replace(of, prompt_logprobs=-1)


def test_each_gets_as_many_of_the_likeliest_as_it_wants(model: OpenedModel) -> None:
    requests = [
        replace(request(PROMPT[start:], ExitParams(mode="full"), max_new_tokens=1), prompt_logprobs=top)
        for start, top in enumerate([2, None, 0, 5])
    ]
    engine = engine_of(model, "compaction", residents=4, chunk=64)
    for of, replies in zip(requests, _served(engine, requests), strict=True):
        _assert_scored(model, of, replies)
    assert engine.batch.num_launches == 1, "all together"


def test_logits_of_a_long_prompt_are_never_all_there(model: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    project = model.runner.project

    def counted(features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        rows.append(len(features_NH))
        return project(features_NH, layer)

    monkeypatch.setattr(model.runner, "project", counted)
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 7 * VOCAB_SIZE)
    numbers = random.Random(1)
    of = request([numbers.randrange(VOCAB_SIZE) for _ in range(40)], ExitParams(mode="full"), max_new_tokens=1)
    scored = replace(of, prompt_logprobs=1)
    (replies,) = _served(engine_of(model, "compaction", residents=1, chunk=64), [scored])
    assert rows == [1, 7, 7, 7, 7, 7, 4], "the new token's, and 39"
    _assert_scored(model, scored, replies)


def test_it_takes_over_no_beginning_and_leaves_its_own(model: OpenedModel) -> None:
    of = request(PROMPT, ExitParams(mode="full"), max_new_tokens=2)
    engine = engine_of(model, "compaction", residents=1, blocks=Blocks(1, 32, 2), keeps_prefixes=True)
    rows = engine.batch.walk.work.rows
    entered = []
    for wanted in (of, replace(of, prompt_logprobs=0), of):
        before = sum(rows.values())
        _served(engine, [wanted])
        entered.append(sum(rows.values()) - before)
    assert entered == [11, 11, 3], "all, all, and what is left beside four blocks of two"
    fresh = engine_of(model, "compaction", residents=1, blocks=Blocks(1, 32, 2), keeps_prefixes=True)
    _served(fresh, [replace(of, prompt_logprobs=0)])
    before = sum(fresh.batch.walk.work.rows.values())
    _served(fresh, [of])
    assert sum(fresh.batch.walk.work.rows.values()) - before == 3


@pytest.mark.parametrize("launches", [1, 2, 3, 4])
@pytest.mark.parametrize("keeps_prefixes", [False, True])
def test_who_makes_way_is_scored_once_and_whole(model: OpenedModel, launches: int, keeps_prefixes: bool) -> None:
    """Between parts of its prompt, which is then scored anew; or after it has been said, and not again."""
    of = replace(request(PROMPT, ExitParams(threshold=0.0), max_new_tokens=4), prompt_logprobs=2)
    blocks = Blocks(1, 32, 2)
    batch = engine_of(model, "compaction", residents=1, chunk=4, blocks=blocks, keeps_prefixes=keeps_prefixes).batch
    planner = make_planner(SchedulingParams(), model.launch_costs, (0, 2, 5, 8), residents=1, prefill_chunk=4)
    slot, replies = batch.add(of), list[Any]()
    for number in range(1, 30):
        if not (fronts := batch.fronts()):
            break
        replies += [reply for _, reply in batch.launch(batch.plan(planner, fronts))]
        if number == launches:
            assert len(replies) == (0 if launches < 3 else launches - 1)
            assert batch.join(batch.pause(slot)) == slot
    _assert_scored(model, of, replies)
    assert said(_text_of(replies)) == said(texts_of(model, [of])[0])


@pytest.mark.parametrize("prompt", [[7, 4, 5, 6], [4, 5, 7, 6, 5]])
@pytest.mark.parametrize("chunk", [2, 8])
def test_whose_prompt_has_no_numbers_fails_alone(mesh: Mesh, prompt: list[int], chunk: int) -> None:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64, model={"tie_embeddings": False})
    with torch.no_grad():
        assert stage.embedding is not None
        stage.embedding.weight[7] = torch.nan
    model = opened(stage)
    bad, good = (
        replace(request(tokens, ExitParams(mode="full"), max_new_tokens=3, logit_bias={7: -100.0}), prompt_logprobs=1)
        for tokens in (prompt, [4, 5, 6, 5])
    )
    engine = engine_of(model, "compaction", residents=2, chunk=chunk)
    of_bad, of_good = _served(engine, [bad, good])
    assert len(of_bad) == 1 and isinstance(of_bad[0], Failure) and "no token can be chosen" in of_bad[0].reason
    _assert_scored(model, good, of_good)
    assert len(_text_of(of_good)) == 3
    assert_nothing_is_left(engine, 2)


NUMBERS = st.floats(max_value=0)
LOGPROBS = st.builds(Logprobs, NUMBERS, st.dictionaries(st.integers(0, 200000), NUMBERS, max_size=3))


@given(
    logprobs=st.lists(LOGPROBS, max_size=4).map(tuple),
    then=st.sampled_from([None, Silence(), Said((Emission(5, 8, 1.0, Logprobs(-0.5, {5: -0.5})),))]),
)
def test_answers_arrive_as_they_were_sent(logprobs: tuple[Logprobs, ...], then: Any) -> None:
    answers = {3: Scored(logprobs, then), 1: Said((Emission(2, 2, 0.5),))}
    assert answers_in(decode(encode({"answers": answers_out(answers)}))["answers"]) == answers
