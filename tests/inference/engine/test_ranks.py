"""Engines of two tensor-parallel ranks, each of which plans for itself, do the same, and say what one rank says."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import request, texts_of
from helpers.ranks import RankPool
from helpers.saved import save_random_run
from helpers.scores import LogprobsOfRows, assert_right, by_one_pass

from megatron_ee.config import Config, ExitParams, SchedulingParams
from megatron_ee.device import choose_device
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.blocks import Blocks
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request, Scores
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.parallel.mesh import Mesh

Text = list[tuple[int, int]]

EXITS: dict[str, Any] = {"layers": [2, 5], "head": ["norm", "block"], "gate": ["none", "linear"]}
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.012},
    {"threshold": 0.012, "kv_policy": "fill", "max_pending": 3},
    {"threshold": 0.012, "kv_policy": "propagate"},
    {"threshold": 0.45, "measure": "gate", "exits": (5,)},
    {"mode": "speculative", "draft_exit": 5, "draft_length": 3},
    {"mode": "sled"},
]


def _requests(seed: int) -> list[Request]:
    numbers = random.Random(seed)
    common = [numbers.randrange(256) for _ in range(10)]
    requests = [
        request(
            common[: numbers.choice([0, 7])] + [numbers.randrange(256) for _ in range(numbers.choice([1, 4, 8]))],
            ExitParams.model_validate(numbers.choice(MODES)),
            max_new_tokens=numbers.randint(1, 12),
            temperature=float(numbers.random() < 0.4),
            seed=numbers.randrange(1000),
        )
        for _ in range(8)
    ]
    return [replace(of, prompt_logprobs=2) if number % 4 == 3 else of for number, of in enumerate(requests)]


def _served(model: OpenedModel, strategy: str, seed: int) -> tuple[list[Text], int, list[Scores | None]]:
    """Texts that come and go in an order of their own, with too little memory; how often one was paused; and scores."""
    requests, numbers = _requests(seed), random.Random(seed)
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": 3})
    planner = make_planner(params, model.launch_costs, model.depths, residents=5, prefill_chunk=6)
    batch = Batch(model, slots=5, capacity=32, prefill_chunk=6, blocks=Blocks(5, 40, 2), keeps_prefixes=seed % 2 > 0)
    engine = Engine(batch, planner, whole=False)
    texts: dict[int, Text] = {}
    scores: dict[int, Scores] = {}
    while len(texts) < len(requests) or not engine.is_idle:
        if len(texts) < len(requests) and numbers.random() < 0.4:
            texts[engine.add(requests[len(texts)])] = []
        for number, reply in engine.step():
            if isinstance(reply, Scores):
                assert number not in scores and not texts[number], "once, and first"
                scores[number] = reply
            else:
                assert isinstance(reply, Emission)
                texts[number].append((reply.token, reply.exit_layer))
    return list(texts.values()), engine.num_paused, [scores.get(number) for number in texts]


def _serve(step: Path, config: Config, seeds: list[int]) -> dict[str, Any]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return {
        strategy: [_served(model, strategy, seed) for seed in seeds]
        for strategy in ("lockstep", "compaction", "rebatch")
    }


def _alone(step: Path, config: Config, seeds: list[int]) -> list[list[Text]]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return [
        [[(of.token, of.exit_layer) for of in texts_of(model, [wanted])[0]] for wanted in _requests(seed)]
        for seed in seeds
    ]


def _by_one_pass(step: Path, config: Config, seeds: list[int]) -> list[list[LogprobsOfRows]]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return [[by_one_pass(model, wanted.prompt) for wanted in _requests(seed)] for seed in seeds]


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 40), marks=pytest.mark.slow)], ids=len)
def test_two_ranks_serve_what_one_says_alone(tmp_path: Path, mesh: Mesh, ranks: RankPool, seeds: range) -> None:
    config, _ = save_random_run(tmp_path / "run", mesh, **EXITS)
    step = tmp_path / "run/checkpoints/step_00000007"
    (alone,) = ranks.run(1, _alone, step, config, list(seeds))
    (logprobs,) = ranks.run(1, _by_one_pass, step, config, list(seeds))
    first, second = ranks.run(2, _serve, step, config, list(seeds))
    assert first == second
    depths = {layer for texts in alone for text in texts for _, layer in text}
    assert depths == {2, 5, 8}, "the case is to mix depths"
    for strategy, served in first.items():
        for seed, expected, of_seed, (texts, _, scores) in zip(seeds, alone, logprobs, served, strict=True):
            assert texts == expected, f"{strategy}, seed {seed}"
            for found, wanted, rows in zip(scores, _requests(seed), of_seed, strict=True):
                assert (found is not None) == (wanted.prompt_logprobs is not None)
                if found is not None:
                    assert_right(found, wanted, rows)
        assert sum(num_paused for _, num_paused, _ in served) > 0, strategy
