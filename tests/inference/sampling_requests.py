"""Requests for the tests of sampling: of any settings, over a small vocabulary."""

from typing import Any

from hypothesis import strategies as st

from megatron_ee.config import SamplingParams
from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling import Draws

VOCAB_SIZE = 24
_TOKENS = st.integers(0, VOCAB_SIZE - 1)

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 3, 8, VOCAB_SIZE, 100]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.4]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.6]),
        "logit_bias": st.dictionaries(_TOKENS, st.sampled_from([-100.0, -1.5, 2.0]), max_size=3),
        "min_new_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(_TOKENS, max_size=3).map(tuple),
        "seed": st.integers(0, 5),
        "logprobs": st.sampled_from([None, 0, 3]),
    },
)

CASES = st.fixed_dictionaries(
    {
        "settings": SETTINGS,
        "prompt": st.lists(_TOKENS, min_size=1, max_size=12),
        "answer": st.lists(_TOKENS, max_size=12),
    }
)


def draws_of(case: dict[str, Any]) -> Draws:
    return draws(case["prompt"], case["answer"], **case["settings"])


def draws(prompt: Any = (0,), answer: Any = (), **settings: Any) -> Draws:
    of = Draws(Request(tuple(prompt), SamplingParams(**settings)))
    of.answer.extend(answer)
    return of
