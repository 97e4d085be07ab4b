"""`propose` and `verify` by themselves: whatever the draft's distribution q, tokens come by full depth's distribution
p, one after the other (arXiv 2211.17192, theorem 1). Thousands of texts by Pearson's test, whose p-value with the seeds
here is to be above 1e-3; where the law is another one, it is below 1e-9.

Shapes: N texts, T tokens of each, V vocabulary. p and q are tables of logits: [V, V] after the newest token; the token
before the first one is 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fits import chi_square
from inference.sampling_requests import draws

from megatron_ee.inference.sampling import Drafted, Draws, Row, probabilities, propose, verify

VOCAB_SIZE = 4
NUM_TOKENS = 3
FIRST = 0


def _table(seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator, dtype=torch.float64) * scale


def _certain(*tokens: int) -> torch.Tensor:
    """After each token one other, for sure."""
    table_VV = torch.full((VOCAB_SIZE, VOCAB_SIZE), -torch.inf, dtype=torch.float64)
    table_VV[range(VOCAB_SIZE), list(tokens)] = 0.0
    return table_VV


def _among(*tokens: int) -> torch.Tensor:
    """The same few tokens after each."""
    table_VV = _table(5)
    table_VV[:, [token for token in range(VOCAB_SIZE) if token not in tokens]] = -torch.inf
    return table_VV


P, Q = _table(0), _table(1)
CASES: dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = {
    "any p and q": (P, Q, {}),
    "p and q are the same": (P, P, {}),
    "q is nearly p": (P, P + 0.1 * Q, {}),
    "no token of both": (_among(0, 1), _among(2, 3), {}),
    "some tokens of both": (_among(0, 1, 2), _among(1, 2, 3), {}),
    "q is sure": (P, _certain(1, 2, 3, 0), {}),
    "p is sure": (_certain(2, 0, 1, 1), Q, {}),
    "top-p": (P, Q, {"top_p": 0.7}),
    "top-k and min-p": (P, Q, {"top_k": 3, "min_p": 0.3}),
    "temperature": (P, Q, {"temperature": 0.6}),
    "all settings": (
        P,
        Q,
        {
            "temperature": 1.3,
            "top_p": 0.95,
            "repetition_penalty": 1.4,
            "frequency_penalty": 0.7,
            "presence_penalty": 0.3,
            "logit_bias": {2: 0.8},
        },
    ),
}


def _last(of: Draws, drafted: Sequence[int] = ()) -> int:
    return [FIRST, *of.answer, *drafted][-1]


def _draft(of: Sequence[Draws], q_VV: torch.Tensor, length: int) -> list[Drafted]:
    tokens: list[list[int]] = [[] for _ in of]
    distributions: list[list[torch.Tensor]] = [[] for _ in of]
    for _ in range(length):
        rows = [Row(one, tuple(drafted)) for one, drafted in zip(of, tokens, strict=True)]
        new, q_NV = propose(q_VV[[_last(row.draws, row.drafted) for row in rows]], rows)
        for number, (token, q_V) in enumerate(zip(new, q_NV, strict=True)):
            assert q_V is not None
            tokens[number].append(token)
            distributions[number].append(q_V)
    return [Drafted(*all_of, length + 1) for all_of in zip(of, tokens, distributions, strict=True)]


def _texts(p_VV: torch.Tensor, q_VV: torch.Tensor, settings: dict[str, Any], lengths: Sequence[int], count: int) -> Any:
    """[N, T]; drafts of each cycle are as long as `lengths` says, in turns. A text goes on until it has all tokens."""
    of = [draws((FIRST,), seed=seed, **{"temperature": 1.0, **settings}) for seed in range(count)]
    cycle = 0
    while going := [one for one in of if len(one.answer) < NUM_TOKENS]:
        drafts = _draft(going, q_VV, lengths[cycle % len(lengths)])
        rows = [_last(row.draws, row.drafted) for draft in drafts for row in draft.rows]
        for one, choices in zip(going, verify(p_VV[rows], drafts), strict=True):
            one.answer.extend(choice.token for choice in choices)
        cycle += 1
    return np.array([one.answer[:NUM_TOKENS] for one in of])


def _joint(p_VV: torch.Tensor, settings: dict[str, Any]) -> Any:
    """Probabilities of all texts, flattened: the law of plain sampling, token by token."""
    joint = np.zeros([VOCAB_SIZE] * NUM_TOKENS)
    for text in np.ndindex(*joint.shape):
        of, p = draws((FIRST,), **{"temperature": 1.0, **settings}), 1.0
        for token in text:
            p *= float(probabilities(p_VV[[_last(of)]], [Row(of)])[0, token])
            of.answer.append(token)
        joint[text] = p
    return joint.ravel()


def _counts(texts_NT: Any) -> Any:
    numbers = np.ravel_multi_index(texts_NT.T, [VOCAB_SIZE] * NUM_TOKENS)
    return np.bincount(numbers, minlength=VOCAB_SIZE**NUM_TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_texts_come_as_often_as_by_plain_sampling(case: str) -> None:
    p_VV, q_VV, settings = CASES[case]
    counts = _counts(_texts(p_VV, q_VV, settings, (2, 1, 3), 1000))
    assert chi_square(counts, _joint(p_VV, settings)) > 1e-3
    if case in ("any p and q", "q is sure", "all settings"):
        assert chi_square(counts, _joint(q_VV, settings)) < 1e-9, "the test sees nothing"


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1,), (2,), (5,), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_many_texts_come_as_often_as_by_plain_sampling(case: str, lengths: tuple[int, ...]) -> None:
    p_VV, q_VV, settings = CASES[case]
    assert chi_square(_counts(_texts(p_VV, q_VV, settings, lengths, 8000)), _joint(p_VV, settings)) > 1e-3


def test_as_many_tokens_are_accepted_as_distributions_have_in_common() -> None:
    """Of drafts of one token, the share sum min(p, q); all of them where the two are the same."""
    for p_VV, q_VV in ((P, Q), (P, P), (_among(0, 1), _among(2, 3)), (_certain(2, 0, 1, 1), Q)):
        of = [draws((FIRST,), seed=seed, temperature=1.0) for seed in range(1000)]
        drafts = _draft(of, q_VV, 1)
        choices = verify(p_VV[[_last(row.draws, row.drafted) for draft in drafts for row in draft.rows]], drafts)
        accepted = np.mean([len(own) == 2 for own in choices])
        common = float(torch.minimum(p_VV[FIRST].softmax(-1), q_VV[FIRST].softmax(-1)).sum())
        assert abs(accepted - common) <= 4 * np.sqrt(common * (1 - common) / 1000) + 1e-12


def test_where_rounding_leaves_nothing_of_p_beyond_q_a_token_is_drawn_by_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token can then be rejected though the two are the same."""
    monkeypatch.setattr(Draws, "uniform", lambda _: 1 - 2**-53)
    same_VV = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    q_V = torch.full((VOCAB_SIZE,), 0.25 * (1 + 2**-50), dtype=torch.float64)
    (choices,) = verify(same_VV[:2], [Drafted(draws(temperature=1.0), [0], [q_V], 2)])
    assert [choice.token for choice in choices] == [VOCAB_SIZE - 1]
