"""A model and data small enough for many cases a second."""

from typing import Any

import torch

from megatron_ee.config import Config

VOCAB_SIZE = 64
SEQUENCE_LENGTH = 12


def tiny_config(**changes: Any) -> Config:
    """8 layers of width 32; `changes` are sections' fields: tiny_config(exits={"layers": [2]})."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "model": {
            "num_layers": 8,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_hidden_size": 48,
            "vocab_size": VOCAB_SIZE,
            "init_std": 0.1,
        },
        "exits": {"layers": [2, 5], "weight_schedule": {"shape": "constant"}},
        "parallel": {},
        "data": {"sequence_length": SEQUENCE_LENGTH},
        "training": {"train_iters": 8, "global_batch_size": 8, "micro_batch_size": 1, "eval_iters": 0},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {},
        "faults": {},
        "logging": {"interval": 1},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return Config.model_validate(tree)


class RandomSamples:
    """Sequences of random tokens whose masks are of unequal length; sample i is the same everywhere."""

    def __init__(self, count: int = 1000) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(VOCAB_SIZE, (SEQUENCE_LENGTH + 1,), generator=generator)
        masked = int(torch.randint(SEQUENCE_LENGTH, (), generator=generator))
        mask = torch.ones(SEQUENCE_LENGTH)
        mask[:masked] = 0
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask}
