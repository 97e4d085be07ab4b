"""What the measures of training share: sizes, configs, batches, and trainers without data or files."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from megatron_ee.config import Config

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    num_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 8192
    sequence_length: int = 256
    micro_batch_size: int = 4
    num_microbatches: int = 2
    num_pipelined_microbatches: int = 4
    losses: tuple[tuple[int, int, int], ...] = (
        (2048, 256, 8192),
        (2048, 512, 32000),
    )  # tokens, hidden size, vocabulary
    rounds: int = 16  # the first is dropped

    @property
    def two_exits(self) -> tuple[int, ...]:
        """At a quarter of the depth, and at half."""
        return self.num_layers // 4, self.num_layers // 2

    @property
    def all_exits(self) -> tuple[int, ...]:
        """On every layer but the last, whose exit every model has."""
        return tuple(range(1, self.num_layers))


SMALL = Sizes(4, 32, 4, 2, 320, 16, 1, 2, 4, ((64, 16, 320),), 3)


def config_of(sizes: Sizes, exits: tuple[int, ...] = (), *, num_microbatches: int, **parallel: Any) -> Config:
    """A run in fp32.

    Args:
        parallel: fields of the section of that name.
    """
    return Config.model_validate(
        {
            "name": "bench",
            "model": {
                "num_layers": sizes.num_layers,
                "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "num_key_value_heads": sizes.num_key_value_heads,
                "vocab_size": sizes.vocab_size,
            },
            "exits": {"layers": exits, "weight_schedule": {"shape": "constant"}},
            "parallel": parallel,
            "data": {"sequence_length": sizes.sequence_length},
            "training": {
                "train_iters": 1000,
                "global_batch_size": sizes.micro_batch_size * num_microbatches,
                "micro_batch_size": sizes.micro_batch_size,
                "eval_iters": 0,
            },
            "optimizer": {"lr": 1e-4, "lr_decay": "constant"},
        }
    )


def random_batch(config: Config) -> "Batch":
    """The same on every rank and in every call; all labels count."""
    from megatron_ee.data.batch import Batch

    rows, length = config.training.micro_batch_size, config.data.sequence_length
    shape = config.training.global_batch_size // rows, rows, length + 1
    drawn_MBS = torch.randint(int(config.model.vocab_size), shape, generator=torch.Generator().manual_seed(0))
    tokens_MBS, labels_MBS = drawn_MBS[..., :-1].contiguous(), drawn_MBS[..., 1:].contiguous()
    return Batch(tokens_MBS, labels_MBS, torch.ones(tokens_MBS.shape))


def cpu_seconds(work: Callable[[], object]) -> float:
    """The CPU time of this process: what else the machine does counts little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def context_of(sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"torch": torch.__version__, "megatron_core": version("megatron-core")}
    return versions | {"threads": torch.get_num_threads(), "sizes": asdict(sizes)} | more
