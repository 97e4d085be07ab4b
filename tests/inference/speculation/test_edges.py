"""Where a draft or a text ends: any number of tokens accepted, stop tokens, stop strings, limits, thresholds; and
what is told of each token. Mostly on models whose exit and full depth say what tables say.

Shapes: V vocabulary.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from helpers.decoding import request, served, texts_of, tokens_of
from helpers.drafts import OTHER, counting_model, drafting, prompts, successors, table_model
from helpers.tiny import tiny_config

from megatron_ee import LLM, SamplingParams
from megatron_ee.config import ExitParams, SchedulingParams
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.inference.speculation.pace import MOST_DRAFTED
from megatron_ee.parallel.mesh import Mesh

FULL = ExitParams(mode="full")


def said(text: list[Emission]) -> list[tuple[int, bool, int]]:
    return [(of.token, of.drafted, of.discarded) for of in text]


def test_of_a_draft_any_number_of_tokens_is_accepted(mesh: Mesh) -> None:
    """All side by side in one batch; what is accepted in one row moves no other."""
    model = counting_model(mesh, *(9 * number + 1 + number for number in range(5)))
    batch = Batch(model, slots=6, capacity=32)
    for number in range(6):
        batch.add(request([9 * number], drafting(draft_length=5), max_new_tokens=12))
    assert [emission.token for _, emission in batch.step()] == [9 * number + 1 for number in range(6)]
    emitted = batch.step()
    for number in range(6):
        first = 9 * number + 2
        expected = [(first + place, True, 0) for place in range(number)]
        expected.append((OTHER, False, 5 - number) if number < 5 else (first + 5, False, 0))
        assert said([emission for slot, emission in emitted if slot == number]) == expected
        assert batch.walk.ledger.length(number) == 1 + 1 + number


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 7])
def test_a_stop_token_ends_the_text_in_a_draft_as_anywhere(agreeing: OpenedModel, length: int, stop: int) -> None:
    of = request([0], drafting(draft_length=length), stop_token_ids=(stop,))
    batch = Batch(agreeing, slots=1, capacity=32)
    slot, text = batch.add(of), []
    while not text or text[-1].finish is None:
        text += [emission for _, emission in batch.step()]
    assert tokens_of(text) == list(range(1, stop + 1))
    assert [emission.finish for emission in text] == [None] * (stop - 1) + ["stop"]
    assert text[-1].drafted == ((stop - 1) % (length + 1) != 0)
    entered = batch.walk.work.rows[0, 2] + batch.walk.work.rows[0, 8]
    assert entered == stop, "the stop token, after which nothing comes, need not enter the model"
    assert batch.walk.ledger.length(slot) == stop


def test_a_drafted_stop_token_that_full_depth_does_not_say_ends_nothing(mesh: Mesh) -> None:
    model = counting_model(mesh, 3)
    of = replace(request([0], drafting(draft_length=8), max_new_tokens=4), stop_token_ids=(4,))
    (text,) = texts_of(model, [of])
    assert said(text) == [(1, False, 0), (2, True, 0), (3, True, 0), (OTHER, False, 0)], "room is for two"
    (text,) = texts_of(model, [replace(of, sampling=SamplingParams(max_new_tokens=8))])
    assert said(text)[:4] == [(1, False, 0), (2, True, 0), (3, True, 0), (OTHER, False, 1)]
    assert text[-1].finish == "length" and len(text) == 8


@pytest.mark.parametrize("length", [1, 3, "auto"])
def test_any_stop_tokens_end_texts_where_full_depth_ends_them(random_model: OpenedModel, length: Any) -> None:
    """Among them tokens that the exit likes and full depth does not, and the other way round."""
    plain = [request(prompt, FULL, stop_token_ids=[*range(seed % 5, 64, 9)]) for seed, prompt in enumerate(prompts(24))]
    expected = served(random_model, plain, 4)
    assert 4 < sum(text[-1].finish == "stop" for text in expected) < 24
    texts = served(random_model, [replace(of, exit=drafting(draft_length=length)) for of in plain], 4)
    for text, wanted in zip(texts, expected, strict=True):
        assert [(of.token, of.finish) for of in text] == [(of.token, of.finish) for of in wanted]


@pytest.mark.parametrize("max_new_tokens", range(1, 9))
def test_a_draft_never_goes_beyond_the_limit(agreeing: OpenedModel, max_new_tokens: int) -> None:
    """Nor beyond the positions that there are: the batch has room for no more."""
    for positions in (None, max_new_tokens + 1):
        model = replace(agreeing, max_positions=positions)
        allowed = max_new_tokens if positions is None else 99
        batch = Batch(model, slots=1, capacity=max_new_tokens + 1)
        slot = batch.add(request([0, 1], drafting(draft_length=5), max_new_tokens=allowed))
        text: list[Emission] = []
        while not text or text[-1].finish is None:
            text += [emission for _, emission in batch.step()]
            assert batch.walk.ledger.length(slot) == 1 + len(text)
        assert [emission.finish for emission in text] == [None] * (max_new_tokens - 1) + ["length"]
        assert tokens_of(text) == list(range(2, max_new_tokens + 2))


def test_no_stop_token_is_drafted_or_accepted_before_min_new_tokens(mesh: Mesh) -> None:
    """Exit and full depth both would say it at once; the draft counts its own tokens, too."""
    drafted_VV, said_VV = successors(), successors()
    drafted_VV[:, OTHER] = said_VV[:, OTHER] = 9.0
    model = table_model(mesh, drafted_VV, said_VV)
    for least, temperature in product(range(10), (0.0, 0.01)):
        of = request(
            [0],
            drafting(draft_length=4),
            min_new_tokens=least,
            stop_token_ids=(OTHER,),
            temperature=temperature,
        )
        (text,) = texts_of(model, [of])
        assert tokens_of(text) == [*range(1, least + 1), OTHER]
        assert text[-1].finish == "stop"
        assert sum(emission.drafted for emission in text) == least + 1 - len(range(0, least + 1, 5))


def _draft_lengths(model: OpenedModel, params: ExitParams, steps: int) -> list[int]:
    """How many tokens each draft of the text of prompt 0 had; full depth says the same."""
    batch = Batch(model, slots=1, capacity=64)
    batch.add(request([0], params, max_new_tokens=60))
    batch.step()
    return [len(batch.step()) - 1 for _ in range(steps)]


def test_a_draft_ends_where_the_exit_is_less_sure_than_is_asked(mesh: Mesh) -> None:
    """After each third token it has but half of the probability, which is enough for a threshold of a half."""
    drafted_VV = successors()
    drafted_VV += torch.where(drafted_VV > 0, 36.0, -1e4)
    drafted_VV[::3, OTHER] = 40.0
    model = table_model(mesh, drafted_VV, successors())
    for threshold, expected in ((0.0, [5, 5, 5]), (0.5, [5, 5, 5]), (0.51, [2, 2, 2]), (1.0, [2, 2, 2])):
        params = drafting(draft_length=5, draft_threshold=threshold)
        assert _draft_lengths(model, params, len(expected)) == expected, threshold


@pytest.mark.parametrize("threshold", [0.02, 0.03, 0.05, 1.0])
def test_a_threshold_moves_no_token(random_model: OpenedModel, threshold: float) -> None:
    asked = prompts(8)
    params = drafting(draft_length=4, draft_threshold=threshold)
    expected = served(random_model, [request(prompt, FULL) for prompt in asked], 8)
    mixed = [request(prompt, params if number % 3 else drafting()) for number, prompt in enumerate(asked)]
    texts = served(random_model, mixed, 8)
    assert [tokens_of(text) for text in texts] == [tokens_of(text) for text in expected]
    accepted = sum(of.drafted for number in (1, 2, 4, 5, 7) for of in texts[number])
    assert (accepted == 0) == (threshold == 1.0)


def test_log_probabilities_are_those_of_plain_decoding(random_model: OpenedModel) -> None:
    """By full depth of every token, and by the exit of those that it was asked about."""
    passing = ExitParams(exits=(2,), threshold=0.999)
    settings = {"logprobs": 3, "exit_logprobs": True, "repetition_penalty": 1.3}
    for prompt in prompts(3, 2):
        plain, drafted = texts_of(
            random_model,
            [request(prompt, of, **settings) for of in (passing, drafting(draft_exit=2, draft_length=3))],
        )
        assert tokens_of(drafted) == tokens_of(plain)
        for emission, wanted in zip(drafted, plain, strict=True):
            assert emission.logprobs is not None and wanted.logprobs is not None
            _assert_same(emission.logprobs, wanted.logprobs)
            assert emission.exit_logprobs is not None and wanted.exit_logprobs is not None
            assert set(wanted.exit_logprobs) == {2, 8} and set(emission.exit_logprobs) in ({2, 8}, {8})
            assert list(emission.exit_logprobs)[-1] == 8
            assert 2 in emission.exit_logprobs or not emission.drafted
            for layer, of_layer in emission.exit_logprobs.items():
                _assert_same(of_layer, wanted.exit_logprobs[layer])
        assert any(2 in (of.exit_logprobs or {}) for of in drafted if not of.drafted), (
            "also of those in another's place"
        )


def _assert_same(ours: Any, theirs: Any) -> None:
    assert ours.token == pytest.approx(theirs.token, abs=1e-9)
    assert list(ours.top) == list(theirs.top)
    assert list(ours.top.values()) == pytest.approx(list(theirs.top.values()), abs=1e-9)


DIGITS = "0123456789:;<=>?"
"""What the counting model says after '/'."""


@pytest.mark.parametrize("length", [1, 3, 12, "auto"])
def test_stop_strings_end_texts_wherever_drafts_begin_and_end(agreeing: OpenedModel, length: Any) -> None:
    """More prompts than slots: the slot of a text that ends within a draft is taken at once."""
    config = tiny_config(inference={"max_batch_size": 3})
    stops: list[tuple[str, ...]] = [(DIGITS[start : start + size],) for start in range(0, 12, 3) for size in (1, 2, 5)]
    stops += [(), ("456", "5"), ("45678", "67"), ("=", "9:;")]
    sampling = [SamplingParams(max_new_tokens=13, stop=stop) for stop in stops]
    llm = LLM.of(agreeing, config)
    expected = llm.generate([[47]] * len(stops), sampling, FULL)
    texts = llm.generate([[47]] * len(stops), sampling, drafting(draft_length=length))
    for stop, text, wanted in zip(stops, texts, expected, strict=True):
        for name in ("text", "tokens", "finish_reason", "stop_reason", "exit_layers"):
            assert getattr(text, name) == getattr(wanted, name), (stop, name)
    assert texts[0].text == "" and {text.finish_reason for text in texts} == {"stop", "length"}


def test_pieces_come_token_by_token_and_end_with_the_stop_string(agreeing: OpenedModel) -> None:
    llm = LLM.of(agreeing, tiny_config())
    sampling = SamplingParams(max_new_tokens=13, stop=("67",))
    pieces = list(llm.stream([[47], [50]], sampling, drafting(draft_length=12)))
    for index, text in ((0, "012345"), (1, "345")):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["stop"]
        assert len(own) == len(text) + 2 and own[-1].stop_reason == "67"


@pytest.mark.parametrize(("chunk", "slots"), [(1, 3), (2, 1), (5, 3), (64, 3)])
def test_prompts_of_any_length_join_drafts_at_any_time(random_model: OpenedModel, chunk: int, slots: int) -> None:
    asked = prompts(9, 3, longest=23)
    modes = [drafting(draft_exit=2, draft_length=3), drafting(draft_exit=5), drafting(draft_length=1), FULL]
    requests = [
        request(prompt, modes[number % 4], max_new_tokens=3 + 5 * number % 11) for number, prompt in enumerate(asked)
    ]
    expected = [texts_of(random_model, [replace(of, exit=FULL)])[0] for of in requests]
    texts = served(random_model, requests, slots, prefill_chunk=chunk)
    assert [tokens_of(text) for text in texts] == [tokens_of(text) for text in expected]


@pytest.mark.parametrize("max_pending", [1, 3, 256])
def test_a_draft_has_no_more_tokens_than_may_wait(agreeing: OpenedModel, max_pending: int) -> None:
    """Also where its length is not given, and all of it is always right: there is no room for more hidden states."""
    params = drafting(max_pending=max_pending)
    batch = Batch(agreeing, slots=2, capacity=60, max_pending=max_pending, prefill_chunk=1)
    for first in (0, 2):
        batch.add(request([first], params, max_new_tokens=55))
    texts: list[list[int]] = [[], []]
    most = 0
    while not texts[0] or len(texts[0]) < 55:
        emitted = batch.step()
        for slot, emission in emitted:
            texts[slot].append(emission.token)
        most = max(most, *(sum(of == slot for of, _ in emitted) - 1 for slot in (0, 1)))
    assert texts == [list(range(1, 56)), list(range(3, 58))]
    assert most == min(max_pending, MOST_DRAFTED)


@pytest.mark.parametrize("strategy", ["lockstep", "compaction", "rebatch"])
def test_what_waits_to_be_verified_fills_no_rows_of_others(random_model: OpenedModel, strategy: str) -> None:
    """A row that an early exit leaves free is for what is owed, and launches here have no room for all drafts."""
    params = SchedulingParams.model_validate({"strategy": strategy, "max_wait": 1, "launch_rows": 3})
    early = [ExitParams(threshold=0.04), FULL, ExitParams(threshold=0.0)]
    modes = [mode for of in early for mode in (of, drafting(draft_exit=2, draft_length=3, kv_policy="fill"))]
    for seed in range(3):
        requests = [request(prompt, mode) for prompt, mode in zip(prompts(6, seed), modes, strict=True)]
        planner = make_planner(params, random_model.launch_costs, random_model.depths, residents=6, prefill_chunk=4)
        engine = Engine(Batch(random_model, slots=6, capacity=32, prefill_chunk=4), planner)
        texts: dict[int, list[int]] = {engine.add(of): [] for of in requests}
        while not engine.is_idle:
            for number, emission in engine.step():
                texts[number].append(emission.token)
        assert list(texts.values()) == [tokens_of(texts_of(random_model, [of])[0]) for of in requests]
