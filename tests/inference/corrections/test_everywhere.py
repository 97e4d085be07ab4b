"""SLED and DoLa where models are opened from disk: by `LLM`, and by ranks that hold half of every matrix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import decode, request, texts_of, tokens_of
from helpers.ranks import RankPool
from helpers.saved import save_random_run

from megatron_ee import LLM, ExitParams, SamplingParams
from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.loading import load_model
from megatron_ee.parallel.mesh import Mesh

EXITS: dict[str, Any] = {
    "layers": [2, 4, 5],
    "head": ["norm", "mlp", "block"],
    "projection": ["shared", "own", "own"],
    "temperature": [1.0, 2.0, 1.5],
}
SETTINGS: list[dict[str, Any]] = [
    {"mode": "sled"},
    {"mode": "full"},
    {"mode": "sled", "sled": {"norm": False, "layers": (4, 5), "alpha": 8.0, "steps": 2}},
    {"mode": "dola"},
    {"mode": "dola", "dola": {"norm": False, "relative_top": 0.3}},
]
PROMPTS = [[1, 2, 3], [40, 5], [7, 7, 7, 250], [9], [100, 200]]


def _decode(step: Path, config: Config) -> list[list[tuple[int, float]]]:
    """On each rank; the matrices are split over as many as there are."""
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    requests = [
        request(prompt, ExitParams.model_validate(settings), temperature=number % 2, seed=number, logprobs=0)
        for number, (prompt, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]
    texts = decode(Batch(model, slots=5, capacity=48), requests)
    return [[(of.token, of.logprobs.token) for of in text if of.logprobs is not None] for text in texts]


def test_two_ranks_say_what_one_does(tmp_path: Path, mesh: Mesh, ranks: RankPool) -> None:
    """The vocabulary, 258 tokens, is padded to 320: the second rank has what is padding."""
    config, _ = save_random_run(tmp_path / "run", mesh, **EXITS)
    step = tmp_path / "run/checkpoints/step_00000007"
    (alone,) = ranks.run(1, _decode, step, config)
    for split in ranks.run(2, _decode, step, config):
        for ours, theirs in zip(split, alone, strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert [logprob for _, logprob in ours] == pytest.approx([logprob for _, logprob in theirs], abs=1e-8)
    assert all(len(text) == 16 for text in alone)


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["inference.exit.mode=sled"], {"mode": "sled"}),
        (
            ["inference.exit.mode=sled", "inference.exit.sled.norm=false", "inference.exit.sled.alpha=9.0"],
            {"mode": "sled", "sled": {"norm": False, "alpha": 9.0}},
        ),
        (
            ["inference.exit.mode=dola", "inference.exit.dola.relative_top=0.3"],
            {"mode": "dola", "dola": {"relative_top": 0.3}},
        ),
    ],
)
def test_llm_takes_them_from_a_call_or_from_the_config(
    tmp_path: Path, mesh: Mesh, overrides: list[str], fields: dict[str, Any]
) -> None:
    save_random_run(tmp_path / "run", mesh, **EXITS)
    sampling, params = SamplingParams(max_new_tokens=12), ExitParams.model_validate(fields)
    llm = LLM(tmp_path / "run", device="cpu")
    (called,) = llm.generate([PROMPTS[0]], sampling, params)
    (configured,) = LLM(tmp_path / "run", overrides=overrides, device="cpu").generate([PROMPTS[0]], sampling)
    (full,) = llm.generate([PROMPTS[0]], sampling, ExitParams(mode="full"))
    assert called.tokens == configured.tokens != full.tokens
    assert set(called.exit_layers) == {8}
    model = load_model(tmp_path / "run/checkpoints/step_00000007", llm.config, choose_device("cpu"))
    (text,) = texts_of(model, [request(PROMPTS[0], params, max_new_tokens=12)])
    assert tokens_of(text) == list(called.tokens)


def test_a_model_without_exits_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    save_random_run(tmp_path / "run", mesh, layers=[])
    llm = LLM(tmp_path / "run", device="cpu")
    for mode in ("sled", "dola"):
        with pytest.raises(FieldError, match=f"inference.exit.mode: {mode}, but no exit is there"):
            llm.generate([[1]], exit=ExitParams(mode=mode))
