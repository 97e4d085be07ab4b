"""Whole tensors from what several ranks hold of them."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_ee.model.stage import Stage

Pieces = dict[str, tuple[tuple[int, ...], list[tuple[tuple[slice, ...], np.ndarray]]]]


def pieces_of(stage: Stage, value_of: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Pieces:
    """name in the whole model -> its shape, and which slices of it this rank holds; `value_of` picks a parameter's
    tensor, and leaves out one for which it gives None."""
    state = stage.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    apply_factories(state)
    pieces: Pieces = {}
    for name, parameter in stage.named_parameters():
        if (value := value_of(parameter)) is None:
            continue
        shards = state[name] if isinstance(state[name], list) else [state[name]]
        values = value.detach().float().chunk(len(shards))
        places = [shard.global_slice() for shard in shards]
        arrays = [value.numpy().copy() for value in values]
        pieces[stage.global_name(name)] = tuple(shards[0].global_shape), list(zip(places, arrays, strict=True))
    return pieces


def whole(parts: Iterable[Pieces]) -> dict[str, np.ndarray]:
    """Every tensor in full; what several ranks hold must be equal."""
    merged: dict[str, np.ndarray] = {}
    for part in parts:
        for name, (shape, pieces) in part.items():
            array = merged.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            for place, piece in pieces:
                known = ~np.isnan(array[place])
                np.testing.assert_array_equal(array[place][known], piece[known], err_msg=name)
                array[place] = piece
    for name, array in merged.items():
        assert not np.isnan(array).any(), f"nobody holds a part of {name}"
    return merged
