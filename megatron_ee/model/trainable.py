"""Which of a stage's parameters are trained."""

from megatron_ee.model.stage import Stage

EXITS = "exits."
"""What the names of all parameters of early exits begin with, in a stage and on disk."""


def train_only_exits(stage: Stage) -> None:
    """Freeze all but what belongs to early exits: embedding, layers, and copies of the shared output weight (EE-Tuning,
    Pan et al., arXiv 2402.00518)."""
    for name, parameter in stage.named_parameters():
        parameter.requires_grad_(stage.global_name(name).startswith(EXITS))
