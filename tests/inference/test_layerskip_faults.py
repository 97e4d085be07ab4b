"""What others' self-speculative decoding gets wrong, as published, each under a test that names it: LayerSkip's own
(Elhoushi et al. 2024), and transformers' `assistant_early_exit`. What torchtune gets wrong in training is in
tests/training: test_curriculum.py, test_layerskip_run.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.decoding import opened, request, texts_of, tokens_of
from helpers.drafts import OTHER, acceptance, counting_model, drafting, prompts, table_model, weaken
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee import LLM, SamplingParams
from megatron_ee.config import ExitParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.completion import Completion, drafts_of
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.show import Summary
from megatron_ee.parallel.mesh import Mesh

FULL = ExitParams(mode="full")


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> OpenedModel:
    stage = whole_model(mesh, exits=[2, 5], dtype=torch.float64)
    weaken(stage, after=2, factor=0.4)
    return opened(stage)


def test_layerskip_and_hugging_face_decode_one_request_at_a_time(model: OpenedModel) -> None:
    """Here rows accept as many tokens as they do, in the same launch, with exits and lengths of their own."""
    modes = [drafting(draft_exit=2, draft_length=4), drafting(draft_exit=5, draft_length=2), drafting(draft_length=1)]
    requests = [request(prompt, modes[number % 3]) for number, prompt in enumerate(prompts(6, 8))]
    batch = Batch(model, slots=6, capacity=32)
    for of in requests:
        batch.add(of)
    batch.step()
    counts = Counter(slot for slot, _ in batch.step())
    assert len(set(counts.values())) > 1, "the case is to be ragged"
    assert batch.walk.work.launches[5, 8] == 1
    assert texts_of(model, requests) == [texts_of(model, [of])[0] for of in requests]


def _favourites(*tokens: int) -> torch.Tensor:
    """The same tokens after each, the first one above all, each next one 0.1 behind."""
    logits_VV = torch.full((VOCAB_SIZE, VOCAB_SIZE), -3.0, dtype=torch.float64)
    for place, token in enumerate(tokens):
        logits_VV[:, token] = 4.0 - 0.1 * place
    return logits_VV


@pytest.mark.parametrize(
    "settings", [{"frequency_penalty": 0.25}, {"repetition_penalty": 1.5}, {"presence_penalty": 1}]
)
def test_layerskip_shows_processors_no_more_than_one_token(mesh: Mesh, settings: dict[str, Any]) -> None:
    """Here penalties see the whole text at each drafted token and at each row that is verified: the exit says just what
    full depth says, so that all is accepted, and what was said, drafted or not, is said less."""
    model = table_model(mesh, _favourites(7, 8, 9, 10, 11, 12), _favourites(7, 8, 9, 10, 11, 12))
    asked = [[7], [3, 8, 9], [50, 10]]
    plain = [request(prompt, FULL, max_new_tokens=13, **settings) for prompt in asked]
    expected = [tokens_of(text) for text in texts_of(model, plain)]
    assert all(first != second for text in expected for first, second in pairwise(text[:5]))
    for length in (1, 4, 11):
        texts = texts_of(model, [replace(of, exit=drafting(draft_length=length)) for of in plain])
        assert [tokens_of(text) for text in texts] == expected
        assert acceptance(texts) == 1


def test_layerskip_divides_by_zero_where_nothing_is_drafted(mesh: Mesh, model: OpenedModel) -> None:
    """A text of one token, an exit that is never sure enough, one that is always wrong and is given up."""
    wrong = counting_model(mesh, *range(VOCAB_SIZE))
    for of, one in (
        (model, request([1], drafting(), max_new_tokens=1)),
        (model, request([1], drafting(draft_threshold=1.0))),
        (wrong, request([1], drafting(), max_new_tokens=60)),
    ):
        (text,) = texts_of(of, [one])
        drafts = drafts_of(text)
        assert drafts.accepted == 0 and drafts.acceptance == (0.0 if drafts.drafted else None)
        assert Completion(one.prompt, "", tuple(text), "length").acceptance == drafts.acceptance
        assert ("accepted" in Summary(text, 1.0).line(8)) == (drafts.drafted > 0)
    assert 0 < drafts.drafted < 20, "60 tokens, none of them drafted rightly"


def test_an_exception_leaves_hugging_faces_model_cut_at_the_exit(
    model: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing of a model is changed while it drafts: whatever goes wrong, the next batch finds it as it was."""
    requests = [request(prompt, drafting(draft_exit=2, draft_length=4)) for prompt in prompts(3)]
    expected = texts_of(model, requests)
    llm = LLM.of(model, tiny_config())
    for stop_at in (1, 2, 3, 4, 6):
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "project", _fails_at(stop_at))
            with pytest.raises(RuntimeError, match="out of memory"):
                _decode_all(Batch(model, slots=3, capacity=64), requests)
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "project", _fails_at(stop_at))
            with pytest.raises(RuntimeError, match="out of memory"):
                llm.generate([[1], [2]], SamplingParams(max_new_tokens=20), drafting(draft_exit=2, draft_length=4))
        assert texts_of(model, requests) == expected
        (text,) = llm.generate([[1]], SamplingParams(max_new_tokens=5), FULL)
        assert set(text.exit_layers) == {8}


def _fails_at(count: int) -> Callable[[Runner, torch.Tensor, int], torch.Tensor]:
    """`Runner.project`, but for one call: the first is of prompts, the next ones of drafts, the sixth verifies."""
    project, numbers = Runner.project, iter(range(1, 1000))

    def fail(runner: Runner, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        if next(numbers) == count:
            raise RuntimeError("out of memory")
        return project(runner, features_NH, layer)

    return fail


def _decode_all(batch: Batch, requests: Sequence[Any]) -> None:
    for of in requests:
        batch.add(of)
    for _ in range(20):
        batch.step()


def test_hugging_face_computes_the_early_layers_twice(mesh: Mesh) -> None:
    """Here verification takes the states that drafting has left at the exit: see also speculation/test_work.py."""
    model = counting_model(mesh)
    (text,) = texts_of(model, [request([1], FULL, max_new_tokens=21)])
    batch = Batch(model, slots=1, capacity=32)
    batch.add(request([1], drafting(draft_length=4), max_new_tokens=21))
    said = [emission.token for _ in range(5) for _, emission in batch.step()]
    assert said == tokens_of(text) and OTHER not in said
    rows = batch.walk.work.rows
    assert rows[0, 2] + rows[0, 8] == rows[2, 8] + rows[0, 8] == 21
