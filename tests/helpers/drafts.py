"""Models whose exits draft what full depth accepts often, seldom, always or never."""

import torch

from megatron_ee.model.stage import Stage


@torch.no_grad()
def weaken(stage: Stage, *, after: int, factor: float) -> None:
    """Have the layers above an exit add little to what it sees: the smaller the factor, the more often it is right."""
    for number in range(after + 1, stage.model.num_layers + 1):
        layer = stage.layers[str(number)]
        for name, parameter in layer.named_parameters():
            if name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
                parameter.mul_(factor)
