"""Which parameters decay: the same whatever backend updates them."""

from fnmatch import fnmatch

import torch

from megatron_ee.config import OptimizerConfig
from megatron_ee.model.stage import Stage


def has_decay(config: OptimizerConfig, stage: Stage, name: str, parameter: torch.nn.Parameter) -> bool:
    """Norms have none (all vectors are without), nor what the config's patterns name. A copy of a shared weight has
    the name of the original, or copies would part.

    Args:
        name: the parameter's, in the stage.
    """
    global_name = stage.global_name(name)
    return parameter.dim() > 1 and not any(fnmatch(global_name, pattern) for pattern in config.no_weight_decay)


def split_by_decay(config: OptimizerConfig, stage: Stage) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters that are trained: those with decay, and those without; each in the stage's order."""
    split: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = ([], [])
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            split[not has_decay(config, stage, name, parameter)].append(parameter)
    return split
