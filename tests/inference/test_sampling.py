"""From logits to tokens, by hand: each setting, ties, what is no choice, random numbers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference.sampling_requests import draws

from megatron_ee.config import SamplingParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling import (
    Draws,
    NoTokenError,
    Row,
    check_sampling,
    choose,
    draw,
    logprobs_of,
    probabilities,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LN = math.log


def _logits_of(*p: float) -> torch.Tensor:
    return torch.tensor([[LN(value) if value else -math.inf for value in p]], dtype=torch.float64)


def _p(logits_1V: torch.Tensor, drafted: tuple[int, ...] = (), **settings: Any) -> list[float]:
    settings = {"temperature": 1.0, **settings}
    prompt, answer = settings.pop("prompt", (0,)), settings.pop("answer", ())
    return probabilities(logits_1V, [Row(draws(prompt, answer, **settings), drafted)])[0].tolist()


def _approx(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-12)


P = _logits_of(0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.4, 0.3, 0.2, 0.1)),
        ({"temperature": 0.5}, (16 / 30, 9 / 30, 4 / 30, 1 / 30)),
        ({"top_k": 2}, (4 / 7, 3 / 7, 0, 0)),
        ({"top_k": 1}, (1, 0, 0, 0)),
        ({"top_k": 4}, (0.4, 0.3, 0.2, 0.1)),
        ({"top_p": 0.39}, (1, 0, 0, 0)),
        ({"top_p": 1e-30}, (1, 0, 0, 0)),
        ({"top_p": 0.41}, (4 / 7, 3 / 7, 0, 0)),
        ({"top_p": 0.71}, (4 / 9, 3 / 9, 2 / 9, 0)),
        ({"min_p": 0.74}, (4 / 7, 3 / 7, 0, 0)),
        ({"min_p": 0.76}, (1, 0, 0, 0)),
        ({"min_p": 0.3, "top_p": 0.5}, (4 / 7, 3 / 7, 0, 0)),  # 0.5 of the 0.9 that min-p leaves: the first has 4/9
        ({"top_k": 2, "top_p": 0.56}, (1, 0, 0, 0)),  # the first has 4/7 of what top-k leaves
        ({"temperature": 2.0, "min_p": 0.55}, (1 / (1 + 0.75**0.5 + 0.5**0.5), None, None, 0)),  # after temperature
    ],
)
def test_temperature_and_truncation(settings: dict[str, Any], expected: tuple[float | None, ...]) -> None:
    got = _p(P, **settings)
    assert [value for value, wanted in zip(got, expected, strict=True) if wanted is not None] == _approx(
        *(wanted for wanted in expected if wanted is not None)
    )
    assert sum(got) == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-320])
def test_a_temperature_near_0_is_greedy(dtype: torch.dtype, temperature: float) -> None:
    logits = torch.tensor([[-500.0, 3.0, 2.5, -2.0]], dtype=dtype)
    assert _p(logits, temperature=temperature) == [0, 1, 0, 0]


def test_equals_at_a_border_stay_together() -> None:
    logits = _logits_of(0.1, 0.3, 0.3, 0.3)
    for limit in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.2}, {"top_p": 0.7}):
        assert _p(logits, **limit) == _approx(0, 1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 2.0}, (1, -4, 1, 0)),
        ({"repetition_penalty": 2.0, "answer": (2, 3)}, (1, -4, 0.5, 0)),
        ({"frequency_penalty": 0.5, "answer": (2, 2, 0)}, (1.5, -2, 0, 0)),
        ({"presence_penalty": 0.5, "answer": (2, 2, 0)}, (1.5, -2, 0.5, 0)),
        ({"frequency_penalty": 0.5, "presence_penalty": -1.0, "answer": (3, 3)}, (2, -2, 1, 0)),
        ({"logit_bias": {1: 5.0, 3: -1.0}}, (2, 3, 1, -1)),
        ({"logit_bias": {1: 5.0}, "repetition_penalty": 2.0}, (1, 1.5, 1, 0)),  # the bias first
        ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "answer": (0,)}, (0, -4, 1, 0)),  # this penalty last
        ({"min_new_tokens": 2, "stop_token_ids": (0, 3), "answer": (1,)}, (-math.inf, -2, 1, -math.inf)),
        ({"min_new_tokens": 2, "stop_token_ids": (0, 3), "answer": (1, 1)}, (2, -2, 1, 0)),
        ({"min_new_tokens": 2}, (2, -2, 1, 0)),
    ],
)
def test_bias_penalties_and_bans(settings: dict[str, Any], expected: tuple[float, ...]) -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert _p(logits, prompt=(0, 1, 1), **settings) == _approx(*wanted.softmax(-1).tolist())
    (choice,) = choose(logits, [draws((0, 1, 1), **settings)])
    assert choice.token == wanted.argmax()
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.0]], "the caller's logits are changed"


def test_greedy_takes_the_penalties_too() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.5, 0.0]])
    assert [choice.token for choice in choose(logits, [draws((1,), (0,), frequency_penalty=1.0)])] == [2]
    assert _p(logits, temperature=0.0, frequency_penalty=1.0, answer=(0,)) == [0, 0, 1, 0]


def test_penalties_follow_an_answer_that_grows() -> None:
    logits = torch.tensor([[3.0, 2.5, 2.2, 0.0]])
    of = draws((3,), frequency_penalty=0.6)
    for _ in range(6):
        of.answer.append(choose(logits, [of])[0].token)
    assert of.answer == [0, 1, 0, 2, 1, 0]


def test_drafted_tokens_are_context() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]] * 3, dtype=torch.float64)
    settings = {
        "temperature": 1.0,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "min_new_tokens": 3,
        "stop_token_ids": (3,),
    }
    of = draws((1,), (2,), **settings)
    drafted = ((), (2, 0), (2, 0, 0, 3))
    p_NV = probabilities(logits, [Row(of, tokens) for tokens in drafted])
    for p_V, tokens in zip(p_NV, drafted, strict=True):
        assert p_V.tolist() == _p(logits[:1], prompt=(1,), answer=(2, *tokens), **settings)
    assert of.answer == [2]
    assert probabilities(logits[:1], [Row(of)]).tolist() == p_NV[:1].tolist(), "a draft is remembered"


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equals_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, [4000, 70, 4999]] = 2
    logits[1, 4999] = 1
    assert [choice.token for choice in choose(logits, [draws()] * 3)] == [70, 4999, 0]
    with_bias = draws(logit_bias={4500: 2.0})
    assert [choice.token for choice in choose(logits, [with_bias] * 3)] == [70, 4500, 4500]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"presence_penalty": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.9}])
def test_a_row_that_allows_no_choice_has_none_and_its_neighbours_have(
    dtype: torch.dtype, bad: float, settings: dict[str, Any]
) -> None:
    logits = torch.zeros(3, 8, dtype=dtype)
    logits[1, 2:] = bad
    logits[1, :2] = bad if bad < 0 else 1
    of = draws(answer=(3,), **settings)
    before, silent, after = choose(logits, [draws(), of, draws(logprobs=1)])
    assert before is not None and silent is None and after is not None
    assert choose(logits, [draws(), draws(logprobs=2, **settings), of])[1] is None
    assert probabilities(logits, [Row(of)] * 3).isnan().tolist() == [[False] * 8, [True] * 8, [False] * 8]


def test_a_ban_on_all_tokens_leaves_none() -> None:
    of = draws(min_new_tokens=1, stop_token_ids=(0, 1))
    assert choose(torch.zeros(1, 2), [of]) == [None]


def test_stop_tokens_of_the_model_beyond_the_vocabulary_ban_nothing_else() -> None:
    of = Draws(Request((0,), SamplingParams(min_new_tokens=1), stop_token_ids=(5, 1)))
    assert [choice.token for choice in choose(torch.tensor([[0.0, 9, 0, 0], [0, 9, 8, 0]]), [of, draws()])] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 3}, True),  # they change no argmax
        ({"min_new_tokens": 3}, True),
        ({"min_new_tokens": 1, "stop_token_ids": (1,)}, True),  # no longer pending
        ({"min_new_tokens": 2, "stop_token_ids": (1,)}, False),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": {0: 0.0}}, False),
        ({"logprobs": 0}, False),
        ({"exit_logprobs": True}, False),
    ],
)
def test_plain_is_what_an_argmax_answers(settings: dict[str, Any], expected: bool) -> None:
    assert draws((0,), (2,), **settings).is_plain is expected


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.7499, 2), (0.75, 4), (1 - 2**-53, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("total", [1.0, 2**-28])
def test_a_draw_is_where_the_cumulative_probability_passes_u(
    u: float, token: int, dtype: torch.dtype, total: float
) -> None:
    p = torch.tensor([[0, 0.25, 0.5, 0, 0.25, 0]], dtype=dtype) * total
    assert draw(p, torch.tensor([u], dtype=torch.float64)) == [token]


@given(
    st.lists(st.integers(0, 2**20), min_size=1, max_size=30).filter(any),
    st.integers(0, 2**53 - 1) | st.sampled_from([0, 2**53 - 1]),
)
def test_a_draw_is_exact(counts: list[int], number: int) -> None:
    """By rational arithmetic."""
    p = torch.tensor([counts], dtype=torch.float64) * 2.0**-25
    token = next(token for token in range(len(counts)) if sum(counts[: token + 1]) * 2**53 > number * sum(counts))
    assert draw(p, torch.tensor([number * 2.0**-53], dtype=torch.float64)) == [token]


def test_a_token_without_probability_is_never_drawn() -> None:
    p_NV = torch.rand(400, 3000, generator=torch.Generator().manual_seed(0)) ** 20
    p_NV[:, ::3] = 0
    p_NV /= p_NV.sum(-1, keepdim=True)
    almost_1 = torch.full((400,), 1 - 2**-53, dtype=torch.float64)
    for u_N in (torch.zeros_like(almost_1), almost_1, torch.rand(400, dtype=torch.float64)):
        assert all(p_NV[row, token] > 0 for row, token in enumerate(draw(p_NV, u_N)))


def test_there_is_nothing_to_draw_from_a_row_without_probability() -> None:
    p_NV = torch.tensor([[0.0, 0.0], [0.5, 0.5], [math.nan, 1.0], [math.inf, 0.0], [1e-30, 0.0]])
    with pytest.raises(NoTokenError, match=r"^no token can be chosen in row 0, 2, 3, 4 of the batch"):
        draw(p_NV, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_are_of_the_logits_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, -1.0, 2.0, 0.5, 2.0], [0.0, 1.0, 0.0, 0.0, 0.0]], dtype=dtype)
    expected = logits.double().log_softmax(-1)
    of = draws((0,), (2,), temperature=0.7, top_k=1, logit_bias={1: 100.0}, logprobs=2)
    first, second = choose(logits, [of, draws(logprobs=0)])
    assert first.token == second.token == 1
    assert first.logprobs is not None and second.logprobs is not None
    assert first.logprobs.token == pytest.approx(expected[0, 1].item(), abs=1e-5)
    assert first.logprobs.top == pytest.approx({0: expected[0, 0].item(), 2: expected[0, 2].item()}, abs=1e-5)
    assert list(first.logprobs.top) == [0, 2]
    assert second.logprobs.top == {}
    assert choose(logits, [draws()] * 2)[0].logprobs is None


def test_the_likeliest_are_in_descending_order_and_of_equals_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0, 2.0]])
    (four,) = logprobs_of(logits, [0], 4)
    assert list(four.top) == [1, 3, 2, 5]
    (all_of_them,) = logprobs_of(logits, [0], 50)
    assert list(all_of_them.top) == [1, 3, 2, 5, 0, 4]
    assert sum(map(math.exp, all_of_them.top.values())) == pytest.approx(1)
    assert all_of_them.token == all_of_them.top[0]


def test_a_seed_is_the_request_s_own_or_the_run_s() -> None:
    def numbers(request: Request) -> list[float]:
        of = Draws(request)
        return [of.uniform() for _ in range(3)]

    own = numbers(Request((1,), SamplingParams(seed=7), seed=1))
    assert own == numbers(Request((2, 3), SamplingParams(seed=7, temperature=1.0), seed=2))
    assert own == numbers(Request((1,), seed=7))
    assert own != numbers(Request((1,), seed=8))
    assert len(set(own)) == 3 and all(0 <= number < 1 for number in own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {3: 1.0, 10: 1.0}}, "inference.sampling.logit_bias: 10 is no token: the vocabulary ends at 9"),
        ({"stop_token_ids": (9, 12)}, "inference.sampling.stop_token_ids: 12 is no token: the vocabulary ends at 9"),
        ({"seed": 2**64}, "inference.sampling.seed: 18446744073709551616 has more than 64 bits"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        check_sampling(SamplingParams(**settings), 10)
    assert str(caught.value) == message


def test_what_can_be_sampled_passes() -> None:
    params = SamplingParams(
        logit_bias={9: 1.0}, stop_token_ids=(9,), stop=("a",), seed=2**64 - 1, min_new_tokens=4, max_new_tokens=4
    )
    check_sampling(params, 10)
    assert 0 <= draws(**{**params.model_dump(), "temperature": 1.0}).uniform() < 1
