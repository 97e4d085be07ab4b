"""A model that is open for decoding, with what belongs to it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_ee.inference.measures import Measure
from megatron_ee.inference.runner import Runner
from megatron_ee.model.stage import Stage
from megatron_ee.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """
    Attributes:
        stage: all layers and exits.
        exits: the layers after which the model has early exits.
        measures: by the names that `inference.exit.measure` may have.
        stop_token_ids: what ends a text unless a request says otherwise.
        max_positions: longest sequence that the model was made for; None: it doesn't say.
    """

    stage: Stage
    tokenizer: Tokenizer
    exits: tuple[int, ...]
    measures: Mapping[str, Measure]
    stop_token_ids: tuple[int, ...] = ()
    max_positions: int | None = None

    @torch.no_grad()
    def full_depth_choices(self, tokens: list[int]) -> list[int]:
        """The token that the full model would choose after each of these, given all before it: the truth that an
        exit's choices are held against."""
        raise NotImplementedError
