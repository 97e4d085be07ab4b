"""The loss that never holds all logits, against the plain one: project, accuracy, cross-entropy, backward.

Shapes: N tokens, H hidden size, V vocabulary.
"""

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from bench_report import Measure, Rounds, measure_of, take_turns
from bench_train_setup import Sizes, context_of, cpu_seconds
from live_bytes import peak_bytes
from torch.nn.functional import cross_entropy, linear

from megatron_ee.config import ExitsConfig

if TYPE_CHECKING:
    from megatron_ee.parallel.mesh import Mesh


_HAS_OWN = hasattr(torch.nn.functional, "linear_cross_entropy")  # since torch 2.13


class Losses:
    """Three ways to the same loss and gradients, of one projection."""

    def __init__(self, num_tokens: int, hidden_size: int, vocab_size: int, mesh: "Mesh") -> None:
        generator = torch.Generator().manual_seed(0)
        self.features_NH = torch.randn(num_tokens, hidden_size, generator=generator, requires_grad=True)
        weight_VH = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
        self.weight_VH = weight_VH.requires_grad_()
        self.labels_N = torch.randint(vocab_size, (num_tokens,), generator=generator)
        self.group = mesh.groups.tp

    def plain(self) -> float:
        """As a loop would have it: whole logits."""
        logits_NV = linear(self.features_NH, self.weight_VH)
        correct = (logits_NV.detach().max(dim=-1).indices == self.labels_N).sum()
        loss = cross_entropy(logits_NV, self.labels_N)
        del logits_NV  # held by the graph for as long as it needs them, and no longer
        torch.autograd.backward(loss)
        return self._end(loss, correct)

    def chunked(self) -> float:
        """The trainer's, with the config's default number of rows."""
        from megatron_ee.model.chunked_loss import projected_loss

        loss = projected_loss(
            self.features_NH[:, None],
            self.weight_VH,
            self.labels_N[:, None],
            torch.ones(len(self.labels_N), 1),
            self.group,
            scale=1 / len(self.labels_N),
            chunk_rows=ExitsConfig().loss_chunk_rows,
        )
        torch.autograd.backward(loss.objective)
        return self._end(loss.objective, loss.correct)

    def of_torch(self) -> float:
        """torch's own, in its default chunks; it has no accuracy."""
        options = torch.nn.LinearCrossEntropyOptions()
        work = torch.nn.functional.linear_cross_entropy
        loss = work(self.features_NH, self.weight_VH, self.labels_N, options=options)
        torch.autograd.backward(loss)
        return self._end(loss)

    def _end(self, *figures: torch.Tensor) -> float:
        """Reads what the host would read, and lets go of the gradients."""
        values = [figure.item() for figure in figures]
        self.features_NH.grad = self.weight_VH.grad = None
        return values[0]


def loss_measures(sizes: Sizes, mesh: "Mesh") -> list[Measure]:
    """Time and memory at each size; at the first one under the plain names."""
    measures = []
    for number, (num_tokens, hidden_size, vocab_size) in enumerate(sizes.losses):
        losses = Losses(num_tokens, hidden_size, vocab_size, mesh)
        assert abs(losses.plain() - losses.chunked()) < 1e-4, "these are not the same loss"
        suffix = "" if number == 0 else f"_vocabulary_{vocab_size}"
        context = context_of(sizes, num_tokens=num_tokens, hidden_size=hidden_size, vocab_size=vocab_size)
        measures += [_time(f"fused_loss_time{suffix}", losses, sizes.rounds, context)]
        measures += [_memory(f"fused_loss_memory{suffix}", losses, context)]
    return measures


def _time(name: str, losses: Losses, num_rounds: int, context: dict[str, Any]) -> Measure:
    def turns(work: Callable[[], float]) -> Rounds:
        return take_turns(num_rounds, lambda: cpu_seconds(losses.plain), lambda: cpu_seconds(work))

    rounds = turns(losses.chunked)
    details = context | {"plain_ms": 1e3 * statistics.median(rounds.a)}
    if _HAS_OWN:
        details["linear_cross_entropy"] = statistics.median(turns(losses.of_torch).paired)
    return measure_of(name, rounds.paired, "lower", rounds.aa, details, goal=0.75)


def _memory(name: str, losses: Losses, context: dict[str, Any]) -> Measure:
    """Beside features, weight and labels; the gradients of the first two are in both."""
    plain, chunked, again = (peak_bytes(work) for work in (losses.plain, losses.chunked, losses.plain))
    details = context | {"bytes_plain": plain, "bytes_fused": chunked}
    if _HAS_OWN:
        details["linear_cross_entropy"] = peak_bytes(losses.of_torch) / plain
    return measure_of(name, [chunked / plain], "lower", again / plain, details, goal=0.5)
