"""What an imported model computes is what transformers computes with it, at its end and at every exit, however it is
split over ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.huggingface import ARCHITECTURES, make_model, save_model
from helpers.ranks import RankPool

from megatron_ee.checkpoint.description import read_description
from megatron_ee.checkpoint.from_huggingface import import_model
from megatron_ee.checkpoint.sharded import model_state
from megatron_ee.checkpoint.sources import open_source
from megatron_ee.config import ExitsConfig, ParallelConfig
from megatron_ee.device import choose_device
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.mesh import open_mesh

NUM_LAYERS = 4
LENGTH = 24
"""Longer than any window, and than the positions of which a scaling says that they were first."""

EXITS = ExitsConfig(layers=(1, 2, 3), norm="shared")
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    ("Llama", {**PLAIN, "tie_word_embeddings": True, "head_dim": 16}),
    ("Qwen3", {"rope_parameters": YARN}),
    ("Qwen2", {"max_window_layers": 0, "tie_word_embeddings": True}),
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step folders of all cases, by their numbers."""
    folder = tmp_path_factory.mktemp("imported")
    for number, (architecture, changes) in enumerate(CASES):
        source = save_model(folder / f"source-{number}", architecture, **changes)
        import_model(source, folder / f"run-{number}", tokenizer="bytes")
    return folder


def _tokens() -> torch.Tensor:
    return torch.randint(320, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _logits_of_all(folder: Path, parallel: dict[str, Any]) -> list[dict[int, np.ndarray]]:
    """On each rank: of each case, its part of the logits [S, B, V] of the exits that it has."""
    mesh = open_mesh(ParallelConfig.model_validate(parallel), choose_device("cpu"))
    return [_logits(folder / f"run-{number}/checkpoints/step_00000000", mesh) for number in range(len(CASES))]


def _logits(step: Path, mesh: Any) -> dict[int, np.ndarray]:
    description = read_description(step)
    chunk = Chunk(0, NUM_LAYERS, (1, 2, 3, 4))
    if mesh.pipeline_size == 2:
        chunk = (Chunk(0, 2, (1, 2)), Chunk(2, NUM_LAYERS, (3, 4)))[mesh.pipeline_rank]
    stage = Stage(
        description.model, EXITS, [chunk], vocab_size=description.vocab_size, groups=mesh.groups, device=mesh.device
    )
    stage.load_sharded(open_source(step, mesh, reads_all=False).load(model_state(stage, mesh)))
    stage.eval().requires_grad_(False)
    positions = torch.arange(LENGTH)
    if chunk.start == 0:
        x_SBH = stage.embed(_tokens())
    else:
        x_SBH = torch.empty(LENGTH, 2, description.model.hidden_size)
        dist.recv(x_SBH, src=0)
    x_SBH, taps = stage.run_layers(x_SBH, positions, chunk.start, chunk.stop)
    if chunk.stop != NUM_LAYERS:
        dist.send(x_SBH, dst=1)
    return {tap.layer: stage.exit_logits(taps[tap], tap.layer, positions).numpy() for tap in taps}


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})], ids=["one", "TP2", "PP2"]
)
def test_logits_are_those_of_transformers(
    imported: Path, ranks: RankPool, world_size: int, parallel: dict[str, int]
) -> None:
    parts = ranks.run(world_size, _logits_of_all, imported, parallel)
    for number, (architecture, changes) in enumerate(CASES):
        expected = _expected(make_model(architecture, **changes))
        for layer, logits in expected.items():
            found = [part[number][layer] for part in parts if layer in part[number]]
            ours = np.concatenate(found, axis=-1)  # over the vocabulary, where it is split
            np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5, err_msg=f"{architecture} {changes} {layer}")


def _expected(model: Any) -> dict[int, np.ndarray]:
    """Of the model, and of the same model with fewer layers."""
    layers, expected = model.model.layers, {}
    for depth in range(1, NUM_LAYERS + 1):
        model.model.layers = layers[:depth]
        model.config.num_hidden_layers = depth
        with torch.no_grad():
            expected[depth] = model(_tokens(), use_cache=False).logits.transpose(0, 1).numpy()
    return expected
