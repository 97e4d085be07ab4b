"""Hugging Face's self-speculation: `generate(assistant_early_exit=E)`.

In transformers 5 the assistant is the model itself with fewer layers. It has a cache of its own, so that verification
runs the first E layers again; it drafts as many tokens as its generation config names, in a nested `generate`; and it
takes one sequence at a time. What it drafts by is the last norm at every depth. Exits here have norms of their own,
which are put in its place, or it would seldom be right. It still says fewer tokens a cycle than the exits here do
at the same length, and may make more passes than tokens it was asked for; both are counted and reported.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from bench_decode_full import HuggingFaceDecoding

if TYPE_CHECKING:
    from megatron_ee.inference.opened import OpenedModel


_SETTINGS = (
    "assistant_early_exit",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)


@dataclass
class AssistedDecoding(HuggingFaceDecoding):
    """Greedy, of one prompt a round.

    Attributes:
        norms: exit -> the weight of its norm.
        passes: by depth, passes through so many layers, over all rounds.
    """

    norms: Mapping[int, torch.Tensor] = field(kw_only=True)
    layer: int = field(kw_only=True)
    length: int = field(kw_only=True)
    passes: Counter[int] = field(default_factory=Counter)

    def __call__(self, number: int) -> float:
        with self._assisted():
            return super().__call__(number)

    @property
    def tokens_per_cycle(self) -> float:
        """Over all rounds."""
        tokens = sum(len(text) for said in self.said.values() for text in said)
        return tokens / self.passes[len(self.model.model.layers)]

    @contextmanager
    def _assisted(self) -> Iterator[None]:
        """The model as it drafts here, and afterwards as it was: its generation config says how far, and an exception
        would leave it with fewer layers."""
        settings, norm = self.model.generation_config, self.model.model.norm
        before = settings.to_dict()
        config, depth = self.model.config, self.model.config.num_hidden_layers
        settings.assistant_early_exit, settings.num_assistant_tokens = self.layer, self.length
        settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = "constant", 0.0
        self.model.model.norm = _NormByDepth(norm, self.norms, config, self.passes)
        try:
            yield
        finally:
            self.model.model.norm, config.num_hidden_layers = norm, depth
            settings.update(**{name: before[name] for name in _SETTINGS})


def norms_of(model: "OpenedModel") -> Mapping[int, torch.Tensor]:
    """Of exits that have one of their own."""
    norms: dict[int, Any] = {layer: model.stage.head(layer).norm for layer in model.exits}
    return {layer: norm.weight for layer, norm in norms.items() if norm is not None}


class _NormByDepth(torch.nn.Module):
    """The norm of the exit where the model ends at the moment."""

    def __init__(self, last: Any, weights: Mapping[int, torch.Tensor], config: Any, passes: Counter[int]) -> None:
        super().__init__()
        self._config, self._passes, self._last = config, passes, last
        self._norms = {layer: copy.deepcopy(last) for layer in weights}
        for layer, weight in weights.items():
            self._norms[layer].weight.data = weight

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        depth = self._config.num_hidden_layers
        self._passes[depth] += 1
        normed: torch.Tensor = self._norms.get(depth, self._last)(x_BSH)
        return normed
