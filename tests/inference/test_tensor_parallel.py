"""Two ranks that hold half of every matrix each decode what one does: tokens, depths, and keys and values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.decoding import decode, request
from helpers.ranks import RankPool
from helpers.saved import save_random_run

from megatron_ee.config import Config, ExitParams
from megatron_ee.device import choose_device
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.loading import load_model
from megatron_ee.parallel.mesh import Mesh

EXITS: dict[str, Any] = {
    "layers": [2, 4, 5, 6],
    "head": ["norm", "mlp", "block", "norm"],
    "projection": ["shared", "shared", "own", "own"],
    "temperature": [1.0, 2.0, 1.5, 1.0],
    "gate": ["linear", "none", "mlp", "none"],
}
ATTENTIONS = (*range(1, 9), 8 + 5)
RULES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"threshold": 0.02, "max_pending": 3},
    {"threshold": 0.02, "kv_policy": "fill", "exits": (5, 6)},
    {"threshold": 0.015, "measure": "margin", "kv_policy": "propagate"},
    {"threshold": 0.8, "measure": "cosine", "exits": (4, 5)},
    {"threshold": 0.4, "measure": "gate", "exits": (2, 5)},
    {"threshold": 0.0, "exits": (5,), "max_pending": 4},
    {"mode": "speculative", "draft_exit": 6, "draft_length": 3},
    {"mode": "speculative", "draft_exit": 5, "draft_length": 2, "draft_threshold": 0.006},
    {"mode": "speculative", "exits": (2, 6)},
    {"mode": "speculative", "draft_exit": 6, "draft_length": 1},
]


def _decode(step: Path, config: Config) -> dict[str, Any]:
    """On each rank; the matrices are split over as many as there are."""
    model = load_model(step, config, choose_device("cpu"), dtype=torch.float64)
    assert model.tokenizer.vocab_size == 258, "of 320 rows; the second rank has some that are padding"
    generator = torch.Generator().manual_seed(0)
    requests = [
        request(
            torch.randint(256, (3 + 2 * number,), generator=generator).tolist(),
            ExitParams.model_validate(rule),
            temperature=float(number % 2),
            seed=number,
        )
        for number, rule in enumerate(RULES)
    ]
    batch = Batch(model, slots=len(RULES), capacity=48, prefill_chunk=16)
    texts = decode(batch, requests)
    batch.flush(range(len(RULES)))
    cache = batch.walk.cache
    return {
        "texts": [[(emission.token, emission.exit_layer) for emission in text] for text in texts],
        "drafts": [[(emission.draft_exit, emission.discarded) for emission in text] for text in texts],
        "confidences": [[emission.confidence for emission in text] for text in texts],
        "cache": {number: cache.of(number).numpy().copy() for number in ATTENTIONS},
        "heads": cache.heads,
        "costs": (model.draft_costs, model.launch_costs),
    }


def test_two_ranks_decode_what_one_does(tmp_path: Path, mesh: Mesh, ranks: RankPool) -> None:
    config, _ = save_random_run(tmp_path / "run", mesh, model={"qk_norm": True, "qkv_bias": True}, **EXITS)
    step = tmp_path / "run/checkpoints/step_00000007"
    (alone,) = ranks.run(1, _decode, step, config)
    split = ranks.run(2, _decode, step, config)
    assert (alone["heads"], [rank["heads"] for rank in split]) == (2, [1, 1])
    depths = [{layer for _, layer in text} for text in alone["texts"]]
    assert len(set.union(*depths)) == 5 and sum(len(of) > 1 for of in depths) >= 3, (
        f"the case is to mix depths: {depths}"
    )
    assert [any(layer for layer, _ in of) or any(gone for _, gone in of) for of in alone["drafts"]] == [
        rule.get("mode") == "speculative" for rule in RULES
    ], "something is to be drafted"
    assert any(layer for of in alone["drafts"] for layer, _ in of), "and something accepted"
    for rank in split:
        assert rank["costs"] == alone["costs"], "they decide where a request drafts"
        assert rank["texts"] == alone["texts"]
        assert rank["drafts"] == alone["drafts"]
        for ours, theirs in zip(rank["confidences"], alone["confidences"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)  # gates are of fp32
    for number in ATTENTIONS:
        joined_PG2CD = np.concatenate([rank["cache"][number] for rank in split], axis=1)
        np.testing.assert_allclose(joined_PG2CD, alone["cache"][number], atol=1e-10, err_msg=str(number))
