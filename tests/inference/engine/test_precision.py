"""In fp32 each request says what it says in fp64, but where two tokens, or an exit and its threshold, are as near to
each other as rounding brings them."""

import random
from typing import Any

import pytest
import torch
from helpers.decoding import full_logits, opened, request, texts_of
from helpers.engines import engine_of
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import ExitParams
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.parallel.mesh import Mesh

MARGIN = 1e-4
THRESHOLD = 0.045
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": THRESHOLD},
    {"threshold": THRESHOLD, "kv_policy": "fill"},
    {"mode": "speculative", "draft_exit": 2, "draft_length": 3},
]


def _requests(seed: int) -> list[Request]:
    numbers = random.Random(seed)
    return [
        request(
            [numbers.randrange(VOCAB_SIZE) for _ in range(numbers.choice([1, 4, 15]))],
            ExitParams.model_validate(numbers.choice(MODES)),
            max_new_tokens=numbers.randint(1, 20),
        )
        for _ in range(16)
    ]


def _served(model: OpenedModel, requests: list[Request], strategy: str, stops: tuple[int, ...]) -> list[list[Emission]]:
    engine = engine_of(
        model, strategy, residents=6, chunk=6, blocks=Blocks(6, 90, 4), whole=False, stops=stops, launch_rows=4
    )
    texts: list[list[Emission]] = [[] for _ in requests]
    for of in requests:
        engine.add(of)
    while not engine.is_idle:
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission)
    return texts


def _assert_near(exact: OpenedModel, of: Request, ours: list[Emission], expected: list[Emission]) -> int:
    """Whether they part, which they may once."""
    for place, (own, wanted) in enumerate(zip(ours, expected, strict=True)):
        if (own.token, own.exit_layer) == (wanted.token, wanted.exit_layer):
            continue
        if own.exit_layer != wanted.exit_layer:
            shallower = min(own, wanted, key=lambda emission: emission.exit_layer)
            assert abs(shallower.confidence - THRESHOLD) < MARGIN
        else:
            tokens = [*of.prompt, *(emission.token for emission in expected[:place])]
            logits_V = full_logits(exact.stage, tokens, own.exit_layer)[-1]
            assert abs(float(logits_V[own.token] - logits_V[wanted.token])) < MARGIN
        return 1
    return 0


@pytest.mark.parametrize(
    ("strategy", "stops"),
    [
        pytest.param("lockstep", (), marks=pytest.mark.slow),
        pytest.param("compaction", (), marks=pytest.mark.slow),
        ("rebatch", ()),
        ("rebatch", (3, 6, 8)),
    ],
    ids=str,
)
def test_fp32_says_what_fp64_says_or_nearly(mesh: Mesh, strategy: str, stops: tuple[int, ...]) -> None:
    exact, rounded = (opened(whole_model(mesh, exits=[2, 5], dtype=dtype)) for dtype in (torch.float64, torch.float32))
    for ours, theirs in zip(rounded.stage.parameters(), exact.stage.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    parted = total = 0
    for seed in range(6):
        requests = _requests(seed)
        for of, text in zip(requests, _served(rounded, requests, strategy, stops), strict=True):
            (expected,) = texts_of(exact, [of])
            parted += _assert_near(exact, of, text, expected)
            total += 1
    assert parted <= total // 20, "such margins are rare"
