"""An exit that is asked whether rows of a launch may leave at it. What it has to compute for an answer, it computes
when that is asked for: a measure that looks at hidden states alone needs no product with the vocabulary.

Shapes: N rows, H hidden size, V the tokenizer's vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from megatron_ee.inference.runner import Runner


class AskedExit:
    """
    Attributes:
        layer: the number of layers run before the exit.
        hidden_NH: what the exit reads, at its tap.
        output_NH: the output of its layer, which is the same for all heads but MLPs.
        previous_NH: the output of the layer of the model's exit before, or the embeddings where there is none.
    """

    def __init__(
        self,
        runner: Runner,
        layer: int,
        *,
        hidden_NH: torch.Tensor,
        output_NH: torch.Tensor,
        previous_NH: torch.Tensor,
        features_NH: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            features_NH: what the projection takes, of an exit that attends; others compute it with the logits.
        """
        self._runner, self.layer = runner, layer
        self.hidden_NH, self.output_NH, self.previous_NH = hidden_NH, output_NH, previous_NH
        self._features_NH = features_NH

    @cached_property
    def logits(self) -> torch.Tensor:
        """[N, V] of the model's dtype, divided by the exit's temperature, without the vocabulary's padding."""
        features_NH = self._features_NH
        if features_NH is None:
            features_NH = self._runner.features(self.hidden_NH, self.layer)
        return self._runner.project(features_NH, self.layer)

    @cached_property
    def output_logits(self) -> torch.Tensor:
        """[N, V] of the layer's output, projected as it is: without the head's norm, MLP or block. As `logits`, they
        are of the model's dtype, divided by the exit's temperature, without the vocabulary's padding."""
        return self._runner.project(self.output_NH, self.layer)

    @cached_property
    def gate_logits(self) -> torch.Tensor:
        """fp32 [N]: how sure the exit's gate is, before the sigmoid."""
        return self._runner.gate_logits(self.hidden_NH, self.layer)

    def of(self, rows: Sequence[int]) -> "AskedExit":
        """Some of the rows; what is computed already isn't computed again."""
        if list(rows) == list(range(len(self.hidden_NH))):
            return self
        index = torch.tensor(rows, device=self.hidden_NH.device)
        part = AskedExit(
            self._runner,
            self.layer,
            hidden_NH=self.hidden_NH[index],
            output_NH=self.output_NH[index],
            previous_NH=self.previous_NH[index],
            features_NH=None if self._features_NH is None else self._features_NH[index],
        )
        for computed in ("logits", "output_logits"):
            if computed in self.__dict__:
                part.__dict__[computed] = self.__dict__[computed][index]
        return part
