"""What the pipeline bench runs on real processes."""

from dataclasses import dataclass

from megatron_ee.parallel.pipeline.simulate import StageCosts


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model on two processes. A head's forward takes about half of the first stage's, and the first stage with its
    exit less than the last: what the premise of exits at no cost asks for."""

    stage_layers: tuple[int, int] = (4, 5)
    chunk_layers: tuple[int, int, int, int] = (2, 2, 2, 3)  # of the same stages in two chunks, in the model's order
    hidden_size: int = 256
    num_attention_heads: int = 4
    vocab_size: int = 8192
    sequence_length: int = 256
    num_microbatches: int = 8
    rounds: int = 16  # the first is dropped
    replays: int = 10


@dataclass(frozen=True, slots=True)
class SleepingSizes:
    """Equal stages, on each a head whose forward takes half of the stage's."""

    forward_s: float = 0.010
    head: float = 0.5
    num_stages: int = 4
    num_microbatches: int = 8
    rounds: int = 16
    replays: int = 10

    @property
    def costs(self) -> StageCosts:
        forward, exits = self.forward_s, 3 * self.head * self.forward_s
        return StageCosts(*((duration,) * self.num_stages for duration in (forward, exits, 2 * forward)))
