"""The micro-batches of one optimizer step, on one data-parallel rank."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Every pipeline stage holds the same batch, and takes from it by micro-batch number.

    Shapes: M micro-batches, B sequences in each, S positions.

    Attributes:
        tokens_MBS, labels_MBS: int64; the label of a position is the token after it.
        mask_MBS: fp32; 1 where the label counts in the loss, else 0.
    """

    tokens_MBS: torch.Tensor
    labels_MBS: torch.Tensor
    mask_MBS: torch.Tensor

    @property
    def num_microbatches(self) -> int:
        return self.tokens_MBS.shape[0]
