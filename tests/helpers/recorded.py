"""A CUDA graph without CUDA: calls of torch are recorded and repeated on the tensors that they were made with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, _tensors(result)))
        return result


class RecordedCapture:
    """A `Capture`. Python that runs between the calls is not repeated, as with CUDA: what a recording computed from
    numbers of its first time, it computes from them again."""

    def __init__(self) -> None:
        self.num_recordings = self.num_repeated = 0

    def __call__(self, computation: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], Sequence[torch.Tensor]]:
        computation()
        with _Recording() as recording:
            results = computation()
        self.num_recordings += 1

        def again() -> Sequence[torch.Tensor]:
            self.num_repeated += 1
            for call in recording.calls:
                _repeat(*call)
            return results

        return again


def _repeat(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor]) -> None:
    """New results go to where the recorded ones are; views are there already, and so is what was changed in place."""
    given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
    for new, recorded in zip(_tensors(function(*args, **kwargs)), results, strict=True):
        if recorded.untyped_storage().data_ptr() not in given:
            recorded.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
