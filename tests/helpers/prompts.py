"""Prompts of which is known how early a random model's answers leave."""

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.llm import LLM

THRESHOLD = 0.02
"""At which half of a random model's tokens leave early after some prompts, and none after others."""
NEW_TOKENS = 64
_CANDIDATES = 64


class Found(NamedTuple):
    """Texts, and the share of their answers' tokens that leave early."""

    normal: list[str]
    slow: list[str]
    normal_share: float
    slow_share: float


def find_prompts(checkpoint: Path, count: int = 4) -> Found:
    """Those whose greedy answers leave earliest, and last: slowdown inputs."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable[:94], k=8)) for _ in range(_CANDIDATES)]
    llm = LLM(checkpoint, device="cpu", overrides=[f"inference.max_batch_size={_CANDIDATES}"])
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    answers = llm.generate(texts, sampling, ExitParams(threshold=THRESHOLD))
    num_layers = llm.config.model.num_layers
    shares = {
        text: sum(layer < num_layers for layer in answer.exit_layers) / NEW_TOKENS
        for text, answer in zip(texts, answers, strict=True)
    }
    ranked = sorted(texts, key=lambda text: shares[text])
    slow, normal = ranked[:count], ranked[-count:]
    return Found(normal, slow, _mean(normal, shares), _mean(slow, shares))


def _mean(texts: Sequence[str], shares: dict[str, float]) -> float:
    return sum(shares[text] for text in texts) / len(texts)
