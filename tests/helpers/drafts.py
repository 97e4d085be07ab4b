"""Self-speculation in tests: models whose exits draft what full depth accepts often, seldom, always or never, and how
often it did.

Shapes: V vocabulary.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from helpers.decoding import opened
from helpers.models import whole_model
from helpers.tiny import VOCAB_SIZE
from megatron_ee.config import ExitParams
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh

OTHER = 60
"""What full depth says where it does not say what a counting model's exit drafts."""


def drafting(**settings: Any) -> ExitParams:
    return ExitParams.model_validate({"mode": "speculative", **settings})


def prompts(count: int, seed: int = 0, *, longest: int = 12) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(VOCAB_SIZE) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def acceptance(texts: Sequence[Sequence[Emission]]) -> float:
    """Share of drafted tokens that full depth accepted."""
    emissions = [emission for text in texts for emission in text]
    accepted = sum(emission.drafted for emission in emissions)
    return accepted / max(1, accepted + sum(emission.discarded for emission in emissions))


@torch.no_grad()
def weaken(stage: Stage, *, after: int, factor: float) -> None:
    """Have the layers above an exit add little to what it sees: the smaller the factor, the more often it is right."""
    for number in range(after + 1, stage.model.num_layers + 1):
        layer = stage.layers[str(number)]
        for name, parameter in layer.named_parameters():
            if name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
                parameter.mul_(factor)


@torch.no_grad()
def table_model(mesh: Mesh, drafted_VV: torch.Tensor, said_VV: torch.Tensor, *, layer: int = 2) -> OpenedModel:
    """A model whose exit and whose full depth have the logits that tables say, by the newest token alone: its layers
    add nothing to the embedding, which is a direction of each token's own. fp64."""
    stage = whole_model(
        mesh, exits=[layer], dtype=torch.float64, projection="own", model={"hidden_size": VOCAB_SIZE, "head_dim": 16}
    )
    weaken(stage, after=0, factor=0.0)
    assert stage.embedding is not None
    far = 1e4  # an embedding so long that the norm's epsilon does not matter
    stage.embedding.weight.copy_(far * torch.eye(VOCAB_SIZE))
    for exit_layer, logits_VV in ((layer, drafted_VV), (stage.model.num_layers, said_VV)):
        stage.projection_weight(exit_layer).copy_(logits_VV.T / math.sqrt(VOCAB_SIZE))
    return opened(stage)


def successors() -> torch.Tensor:
    """Logits_VV of a model that counts: after each token the next one, by some margin."""
    logits_VV = torch.zeros(VOCAB_SIZE, VOCAB_SIZE, dtype=torch.float64)
    logits_VV[torch.arange(VOCAB_SIZE), (torch.arange(VOCAB_SIZE) + 1) % VOCAB_SIZE] = 4.0
    return logits_VV


def counting_model(mesh: Mesh, *disagreements: int) -> OpenedModel:
    """Exit and full depth count, but after these tokens full depth says something else."""
    said_VV = successors()
    said_VV[list(disagreements), OTHER] = 9.0
    return table_model(mesh, successors(), said_VV)
