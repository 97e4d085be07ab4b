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
        positions_MBS: int64; from 0 in each document of a sequence. None: from 0 to S - 1 in every sequence.
        documents_MBS: int32; the number of the document within its sequence that a position is of, padding being one
            of its own. None: every sequence is one, as far as attention is concerned.
    """

    tokens_MBS: torch.Tensor
    labels_MBS: torch.Tensor
    mask_MBS: torch.Tensor
    positions_MBS: torch.Tensor | None = None
    documents_MBS: torch.Tensor | None = None

    @property
    def num_microbatches(self) -> int:
        return self.tokens_MBS.shape[0]

    def places_of(self, microbatch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`positions` and `documents_BS` of a micro-batch, as `Stage.run_layers` takes them."""
        if self.positions_MBS is None or self.documents_MBS is None:
            return torch.arange(self.tokens_MBS.shape[2], device=self.tokens_MBS.device), None
        return self.positions_MBS[microbatch].T, self.documents_MBS[microbatch]
