"""Stages in processes of their own, each of which plans for all, say what one process says."""

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
from megatron_ee.inference.scheduling.strategies.named import make_stage_planner
from megatron_ee.parallel.mesh import Mesh

Text = list[tuple[int, int]]

EXITS: dict[str, Any] = {"layers": [2, 5], "head": ["norm", "block"], "gate": ["none", "linear"]}
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.012},
    {"threshold": 0.012, "patience": 2},
    {"threshold": 0.012, "kv_policy": "fill", "max_pending": 3},
    {"threshold": 0.012, "kv_policy": "propagate"},
    {"threshold": 0.6, "measure": "cosine"},
    {"threshold": 0.45, "measure": "gate", "exits": (5,)},
    {"mode": "speculative", "draft_exit": 5, "draft_length": 3},
    {"mode": "speculative", "draft_exit": 2, "draft_length": 2},
    {"mode": "sled"},
    {"mode": "dola", "dola": {"layers": (5,)}},
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
            exit_logprobs=numbers.random() < 0.2,
        )
        for _ in range(10)
    ]
    return [replace(of, prompt_logprobs=2) if number % 4 == 3 else of for number, of in enumerate(requests)]


def _served(model: OpenedModel, strategy: str, seed: int) -> tuple[list[list[Emission]], int, list[Scores | None]]:
    """Texts that come and go in an order of their own, with too little memory; how often one was paused; and scores."""
    requests, numbers = _requests(seed), random.Random(seed)
    params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": numbers.choice([None, 3])})
    planner = make_stage_planner(params, model.launch_costs, model.stages, model.depths, residents=5, prefill_chunk=6)
    batch = Batch(model, slots=5, capacity=32, prefill_chunk=6, blocks=Blocks(5, 40, 2), keeps_prefixes=seed % 2 > 0)
    engine = Engine(batch, planner, whole=False)
    texts: dict[int, list[Emission]] = {}
    scores: dict[int, Scores] = {}
    while len(texts) < len(requests) or not engine.is_idle:
        if numbers.random() < 0.02 and texts:
            engine.abort(numbers.choice([*texts]))
        if len(texts) < len(requests) and numbers.random() < 0.4:
            texts[engine.add(requests[len(texts)])] = []
        for number, reply in engine.step():
            if isinstance(reply, Scores):
                assert number not in scores and not texts[number], "once, and first"
                scores[number] = reply
            else:
                assert isinstance(reply, Emission)
                texts[number].append(reply)
    engine.close()
    return list(texts.values()), engine.num_paused, [scores.get(number) for number in texts]


def _serve(step: Path, config: Config, seeds: list[int]) -> dict[str, Any]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return {
        strategy: [_served(model, strategy, seed) for seed in seeds]
        for strategy in ("lockstep", "compaction", "rebatch")
    }


def _alone(step: Path, config: Config, seeds: list[int]) -> list[list[list[Emission]]]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return [[texts_of(model, [wanted])[0] for wanted in _requests(seed)] for seed in seeds]


def _by_one_pass(step: Path, config: Config, seeds: list[int]) -> list[list[LogprobsOfRows]]:
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    return [[by_one_pass(model, wanted.prompt) for wanted in _requests(seed)] for seed in seeds]


def _of(text: list[Emission]) -> Text:
    return [(of.token, of.exit_layer) for of in text]


def _exits_heard(of: Emission) -> dict[int, float]:
    return {layer: round(one.token, 9) for layer, one in (of.exit_logprobs or {}).items()}


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 30), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(
    ("layout", "tensor"),
    [
        pytest.param((5, 3), 1, marks=pytest.mark.slow),
        ((3, 3, 2), 1),
        pytest.param((2, 2, 2, 2), 1, marks=pytest.mark.slow),
        ((3, 5), 2),
    ],
    ids=str,
)
def test_stages_serve_what_one_process_says_alone(
    tmp_path: Path, mesh: Mesh, ranks: RankPool, layout: tuple[int, ...], tensor: int, seeds: range
) -> None:
    config, _ = save_random_run(tmp_path / "run", mesh, **EXITS)
    step = tmp_path / "run/checkpoints/step_00000007"
    (alone,) = ranks.run(1, _alone, step, config, list(seeds))
    (logprobs,) = ranks.run(1, _by_one_pass, step, config, list(seeds))
    parallel = {"pipeline": len(layout), "layout": layout}
    inference = config.inference.model_copy(update={"parallel": type(config.inference.parallel)(**parallel)})
    cut = config.model_copy(update={"inference": inference})
    first, *others = ranks.run(len(layout) * tensor, _serve, step, cut, list(seeds))
    assert all(other == first for other in others)
    assert {of.exit_layer for texts in alone for text in texts for of in text} == {2, 5, 8}
    for strategy, served in first.items():
        for seed, expected, of_seed, (texts, _, scores) in zip(seeds, alone, logprobs, served, strict=True):
            for found, wanted, text, rows in zip(scores, _requests(seed), texts, of_seed, strict=True):
                assert (found is not None) == (wanted.prompt_logprobs is not None and len(text) > 0)
                if found is not None:
                    assert_right(found, wanted, rows)
            for number, (text, whole) in enumerate(zip(texts, expected, strict=True)):
                where = f"{strategy}, seed {seed}, request {number}"
                assert _of(text) == _of(whole[: len(text)]), where
                assert [_exits_heard(of) for of in text] == [_exits_heard(of) for of in whole[: len(text)]], where
            num_whole = sum(len(text) == len(whole) for text, whole in zip(texts, expected, strict=True))
            assert num_whole >= len(texts) // 2, "most are not aborted"
    assert sum(num_paused for served in first.values() for _, num_paused, _ in served) > 0
