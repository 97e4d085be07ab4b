"""A batch of sequences that decode together, each token as deep as it needs to go."""

from collections.abc import Sequence

from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Emission, Request


class Batch:
    """Sequences join and leave at any time; a step is one token of each.

    Args:
        slots: most sequences at a time.
        capacity: longest sequence, prompt and answer, in positions.
        max_pending: the largest that a request may name.
        prefill_chunk: positions of a prompt that run through the model at once.
    """

    def __init__(
        self, model: OpenedModel, *, slots: int, capacity: int, max_pending: int = 256, prefill_chunk: int = 512
    ) -> None:
        raise NotImplementedError

    @property
    def free_slots(self) -> int:
        raise NotImplementedError

    def add(self, request: Request) -> int:
        """Take in a request; returns its slot.

        Raises:
            FieldError: it names an exit that the model doesn't have, or asks a gate that isn't there; or the prompt is
                longer than the model's positions or the batch's capacity.
        """
        raise NotImplementedError

    def step(self) -> list[tuple[int, Emission]]:
        """One token of every sequence whose text goes on, by its slot. After one with `finish` there are no more."""
        raise NotImplementedError

    def flush(self, slots: Sequence[int]) -> None:
        """Take all pending positions of these sequences to full depth."""
        raise NotImplementedError

    def remove(self, slot: int) -> None:
        """Forget a sequence, finished or not; its slot is free."""
        raise NotImplementedError
