"""What holds for any requests: no neighbour matters, and tokens come as often as they should."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference.sampling_requests import CASES, VOCAB_SIZE, draws, draws_of

from megatron_ee.inference.sampling import Choice, Draws, Row, choose, probabilities
from megatron_ee.inference.sampling.history import History

TOKENS = st.lists(st.integers(0, 30), max_size=40)


def _steps(of: list[Draws], logits_TNV: torch.Tensor) -> list[list[Choice]]:
    """By row, then by step."""
    answers: list[list[Choice]] = [[] for _ in of]
    for logits_NV in logits_TNV:
        for row, answer, choice in zip(of, answers, choose(logits_NV, of), strict=True):
            row.answer.append(choice.token)
            answer.append(choice)
    return answers


@given(
    st.lists(CASES, min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([VOCAB_SIZE, 1500]),
)
@settings(max_examples=60)
def test_a_request_alone_is_the_same_among_neighbours(
    cases: list[dict[str, Any]], seed: int, dtype: torch.dtype, vocab_size: int
) -> None:
    """In half precision many logits are equal, which is where sorting could go either way."""
    generator = torch.Generator().manual_seed(seed)
    logits_TNV = (torch.randn(3, len(cases), vocab_size, generator=generator) * 3).to(dtype)
    together = _steps([draws_of(case) for case in cases], logits_TNV)
    for number, case in enumerate(cases):
        assert _steps([draws_of(case)], logits_TNV[:, number : number + 1]) == [together[number]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neighbours_of_all_kinds_in_a_large_vocabulary(dtype: torch.dtype) -> None:
    """Some nuclei here are larger than what is sorted at first."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 9.0, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 40},
        {"temperature": 0.7, "min_p": 0.1},
        {"temperature": 1.0},
        {"repetition_penalty": 1.2},
        {},
    ]
    logits_TNV = (torch.randn(20, len(kinds), 5000, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    together = _steps([draws(seed=number, **kind) for number, kind in enumerate(kinds)], logits_TNV)
    for number, kind in enumerate(kinds):
        alone = _steps([draws(seed=number, **kind)], logits_TNV[:, number : number + 1])
        assert alone == [together[number]]


SMALL = torch.tensor([[1.2, 0.9, 0.7, 0.4, 0.1, -0.3, -0.8, -1.5, -2.0, -3.0]], dtype=torch.float64)
LIMITED = {
    "temperature": 0.8,
    "top_p": 0.85,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "logit_bias": {6: 1.5},
}


def _expected() -> list[float]:
    """By plain arithmetic, for the prompt 0 5 and the answer 1 1 2."""
    logits = SMALL[0].tolist()
    logits[6] += 1.5
    for token in (0, 5, 1, 2):
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    for token, count in ((1, 2), (2, 1)):
        logits[token] -= 0.3 * count + 0.2
    p = (torch.tensor(logits, dtype=torch.float64) / 0.8).exp()
    p /= p.sum()
    kept, reached = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if reached < 0.85:
            kept.append(token)
        reached += p[token].item()
    total = sum(p[token].item() for token in kept)
    return [p[token].item() / total if token in kept else 0.0 for token in range(len(logits))]


def _fits(tokens: list[int], expected: list[float]) -> float:
    """p-value of Pearson's chi-square test; 0 where something came that never should."""
    counts, possible = Counter(tokens), [token for token, p in enumerate(expected) if p]
    if counts.keys() - set(possible):
        return 0.0
    square = sum(
        (counts[token] - len(tokens) * expected[token]) ** 2 / (len(tokens) * expected[token]) for token in possible
    )
    half = torch.tensor([(len(possible) - 1) / 2, square / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def test_tokens_come_as_often_as_they_should() -> None:
    expected = _expected()
    assert 4 <= sum(p > 0 for p in expected) <= 8, "top-p is to cut some"
    assert probabilities(SMALL, [Row(draws((0, 5), (1, 1, 2), **LIMITED))])[0].tolist() == pytest.approx(expected)
    one = draws((0, 5), (1, 1, 2), seed=3, **LIMITED)
    drawn = [choice.token for choice in choose(SMALL.expand(10_000, -1).contiguous(), [one] * 10_000)]
    assert _fits(drawn, expected) > 1e-3
    assert _fits(drawn, [*reversed(expected)]) < 1e-6, "the test sees nothing"


def test_first_tokens_of_neighbouring_seeds_are_independent() -> None:
    many = [draws((0, 5), (1, 1, 2), seed=seed, **LIMITED) for seed in range(2000)]
    assert _fits([choice.token for choice in choose(SMALL.expand(2000, -1), many)], _expected()) > 1e-3


@given(TOKENS, st.lists(TOKENS, max_size=6), TOKENS)
def test_history_counts_the_answer(prompt: list[int], answers: list[list[int]], drafted: list[int]) -> None:
    history, answer = History(prompt), Counter[int]()
    for tokens in answers:
        history.extend(tokens)
        answer.update(tokens)
        for draft in ([], drafted):
            found, counts = history.counted(draft)
            expected = {**dict.fromkeys(prompt, 0), **(answer + Counter(draft))}
            assert len(found) == len(expected)
            assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == expected


def test_a_long_history_has_room() -> None:
    history = History(range(100))
    history.extend([*range(50, 1000), *range(500)])
    found, counts = history.counted()
    assert sorted(found) == list(range(1000))
    assert counts.sum() == 1450
