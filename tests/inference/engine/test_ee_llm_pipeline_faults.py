"""What EE-LLM's pipelined decoding gets wrong (Chen et al. 2023, as published), each under a test that names it: it
decodes one prompt at a time, without tensor parallelism and in fp32 alone, never stops at the end of a text, runs a
prompt again whose last token exits, and two requests at once mix up its messages.

Tensor parallelism and requests that come while others are under way, in processes of their own, are also in
test_pipeline_ranks.py.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import opened, request, texts_of
from helpers.engines import engine_of, said
from helpers.models import whole_model
from helpers.ranks import RankPool
from helpers.saved import save_random_run
from helpers.tiny import VOCAB_SIZE

from megatron_ee.config import Config, ExitParams
from megatron_ee.device import choose_device
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import load_model
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request
from megatron_ee.parallel.mesh import Mesh

STOPS = (3, 6, 8)
EXITS = [2, 5, 7]


@pytest.fixture(scope="module")
def model(mesh: Mesh) -> OpenedModel:
    """An exit on every stage, the last one too."""
    return opened(whole_model(mesh, exits=EXITS, dtype=torch.float64))


def _prompt(count: int, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCAB_SIZE) for _ in range(count)]


def _texts(engine: Engine, requests: list[Request]) -> list[list[Emission]]:
    texts: dict[int, list[Emission]] = {engine.add(of): [] for of in requests}
    while not engine.is_idle:
        for number, emission in engine.step():
            assert isinstance(emission, Emission)
            texts[number].append(emission)
    return list(texts.values())


def test_ee_llm_pipelines_decode_one_prompt_at_a_time(model: OpenedModel) -> None:
    requests = [request(_prompt(3, seed), ExitParams(threshold=0.025), max_new_tokens=12) for seed in range(6)]
    engine = engine_of(model, "compaction", residents=6, stops=STOPS, launch_rows=6)
    texts = _texts(engine, requests)
    work = engine.batch.walk.work
    assert sum(work.rows.values()) > 1.5 * sum(work.launches.values()), "they share launches"
    for text, of in zip(texts, requests, strict=True):
        assert said(text) == said(texts_of(model, [of])[0])


def test_ee_llm_pipelines_never_stop_at_the_end_of_a_text(model: OpenedModel) -> None:
    """And nothing runs after it, on any stage: no position is there that is not of the text."""
    of = request(_prompt(4, 1), ExitParams(threshold=0.025), max_new_tokens=16)
    (whole,) = texts_of(model, [of])
    end = whole[7].token
    place = next(number for number, emission in enumerate(whole) if emission.token == end)
    stopping = Request(of.prompt, of.sampling, of.exit, stop_token_ids=(end,))
    engine = engine_of(model, "compaction", residents=2, stops=STOPS)
    (text,) = _texts(engine, [stopping])
    assert said(text) == said(whole[: place + 1])
    assert text[-1].finish == "stop"
    entered = sum(rows for (start, _), rows in engine.batch.walk.work.rows.items() if start == 0)
    assert entered == len(of.prompt) + place
    assert engine.step() == [] and engine.batch.walk.blocks.num_free == engine.batch.walk.blocks.num_positions


def test_ee_llm_crashes_at_an_exit_on_the_last_stage(model: OpenedModel) -> None:
    of = request(_prompt(5, 2), ExitParams(exits=(7,), threshold=0.02), max_new_tokens=12)
    (text,) = _texts(engine_of(model, "compaction", residents=1, stops=STOPS), [of])
    assert {emission.exit_layer for emission in text} == {7}
    assert said(text) == said(texts_of(model, [of])[0])


@pytest.mark.parametrize("policy", ["recompute", "fill"])
def test_ee_llm_runs_a_prompt_again_whose_last_token_exits(model: OpenedModel, policy: str) -> None:
    """No layer sees a position twice; with exits at the first stage alone the others see none before it is needed."""
    params = ExitParams.model_validate({"exits": (2,), "threshold": 0.0, "kv_policy": policy})
    engine = engine_of(model, "compaction", residents=1, chunk=64, stops=(2, 4, 8))
    (text,) = _texts(engine, [request(_prompt(9, 3), params, max_new_tokens=10)])
    assert {emission.exit_layer for emission in text} == {2}
    rows = engine.batch.walk.work.rows
    assert rows[0, 2] == 9 + 9, "each position once"
    deeper = sum(count for (start, _), count in rows.items() if start == 2)
    assert deeper == 0 if policy == "recompute" else 9 <= deeper <= 18


MODES: list[dict[str, Any]] = [{"mode": "full"}, {"threshold": 0.012, "kv_policy": "fill"}, {"threshold": 0.02}]


def _alone_and_together(step: Path, config: Config, dtype: torch.dtype) -> tuple[Any, Any]:
    """Texts one after the other, and all at once, of whatever processes there are."""
    model = load_model(step, config, choose_device("cpu"), dtype=dtype)
    requests = [
        request(_prompt(6, seed), ExitParams.model_validate(mode), max_new_tokens=16) for seed, mode in enumerate(MODES)
    ]
    alone = []
    for of in requests:
        engine = engine_of(model, "compaction", residents=1)
        alone += _texts(engine, [of])
        engine.close()
    engine = engine_of(model, "compaction", residents=3)
    together = _texts(engine, requests)
    engine.close()
    return [said(text) for text in alone], [len(text) for text in together]


def test_ee_llm_pipelines_have_neither_half_precision_nor_tensor_parallelism(
    tmp_path: Path, mesh: Mesh, ranks: RankPool
) -> None:
    """In bf16, two stages of two tensor-parallel ranks say, for one request at a time, what one stage of two says: the
    same rows in the same launches."""
    config, _ = save_random_run(tmp_path / "run", mesh, layers=[2, 5])
    step = tmp_path / "run/checkpoints/step_00000007"
    (expected, lengths), _ = ranks.run(2, _alone_and_together, step, config, torch.bfloat16)
    inference = config.inference.model_copy(
        update={"parallel": type(config.inference.parallel)(pipeline=2, layout=(5, 3))}
    )
    cut = config.model_copy(update={"inference": inference})
    served = ranks.run(4, _alone_and_together, step, cut, torch.bfloat16)
    assert all(of == served[0] for of in served)
    texts, together = served[0]
    assert together == lengths == [16, 16, 16]
    assert texts == expected
