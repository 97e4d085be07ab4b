"""What the test of sampling runs on each device."""

from typing import Any, Literal

import torch

from megatron_ee.config import SamplingParams
from megatron_ee.device import choose_device
from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling import Draws, choose

KINDS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {7: 2.0}},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "logprobs": 3},
    {"temperature": 3.0, "top_p": 0.95, "presence_penalty": 0.5},
    {"temperature": 0.7, "min_p": 0.05, "min_new_tokens": 5, "stop_token_ids": (1, 2)},
]


def sampled(name: Literal["cpu", "cuda"], dtype: torch.dtype) -> dict[str, list[list[int]]]:
    """Every kind's answer to the same logits: on the CPU, on the device, and there without neighbours."""
    device = choose_device(name).torch
    logits_TNV = torch.randn(12, len(KINDS), 4000, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    everywhere = logits_TNV.to(device)
    alone = [_answers([kind], everywhere[:, number : number + 1])[0] for number, kind in enumerate(KINDS)]
    return {"cpu": _answers(KINDS, logits_TNV), "device": _answers(KINDS, everywhere), "alone": alone}


def _answers(kinds: list[dict[str, Any]], logits_TNV: torch.Tensor) -> list[list[int]]:
    draws = [Draws(Request((5, 6), SamplingParams(seed=1, **kind))) for kind in kinds]
    for logits_NV in logits_TNV:
        for of, choice in zip(draws, choose(logits_NV, draws), strict=True):
            of.answer.append(choice.token)
    return [of.answer for of in draws]
