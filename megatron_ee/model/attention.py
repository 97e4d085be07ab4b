"""Core attention on torch's scaled_dot_product_attention: rotary positions, with or without a key-value store.

Shapes: S query positions, T positions attended to, B batch, H query heads, G key-value heads, D head dimension.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_ee.model.masks import Window
from megatron_ee.model.rotary import Rotation, rotate


class KeyValueStore(Protocol):
    """Past keys and values of a sequence, for the layers that run with it."""

    def extend(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store this launch's keys and values; return all that its queries may see.

        Args:
            layer: the attention's number: see `Stage.attention_windows`.

        Returns:
            key [T, B, G, D], value [T, B, G, D], and a boolean mask [S, T]: true where query s sees position t.
        """
        ...


class Launch(NamedTuple):
    """What the attentions of all layers that run together have in common.

    Attributes:
        store: past keys and values, and what is seen of them; None: self-attention within the sequence.
        masks: of attentions with the same window: what is added to a query's scores, [1 or B, 1, S, S]; None: it sees
            every position up to its own. Not with a store.
    """

    rotation: Rotation
    store: KeyValueStore | None = None
    masks: Mapping[Window, torch.Tensor | None] = MappingProxyType({})

    def of_rows(self, rows_K: torch.Tensor) -> "Launch":
        """The launch of some of the sequences only; not with a store."""
        assert self.store is None, "layers are skipped in training only"
        masks = {
            window: mask if mask is None or len(mask) == 1 else mask.index_select(0, rows_K)
            for window, mask in self.masks.items()
        }
        if self.rotation.cosine.shape[1] == 1:  # all sequences are at the same positions
            return self._replace(masks=masks)
        rotation = Rotation(*(part.index_select(1, rows_K) for part in self.rotation))
        return Launch(rotation, masks=masks)


class AttentionContext:
    """Tells attentions which launch they are part of: megatron-core's layers between hand nothing through.

    Whoever runs a layer sets it just before.

    Attributes:
        recomputes: whether the backward of an attention computes it again, instead of keeping what it made.

    Args:
        window_of: a layer's window.
    """

    launch: Launch
    recomputes = False

    def __init__(self, window_of: Callable[[int], Window]) -> None:
        self.window_of = window_of


class CoreAttention(MegatronModule):
    """Attention proper, between megatron-core's QKV and output projections."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        context: AttentionContext,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.context = context
        # The block in the head of an exit after a layer is numbered on from the last layer: it has that layer's window.
        self.window = context.window_of((layer_number - 1) % config.num_layers + 1)

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        *unused: Any,
        **unused_too: Any,
    ) -> torch.Tensor:
        """Attend; returns [S, B, H*D]."""
        attend = partial(self._attend, self.context.launch)  # other micro-batches have theirs before a backward
        if self.context.recomputes and torch.is_grad_enabled():
            return checkpoint(attend, query_SBHD, key_SBGD, value_SBGD, use_reentrant=False, preserve_rng_state=False)
        return attend(query_SBHD, key_SBGD, value_SBGD)

    def _attend(
        self, launch: Launch, query_SBHD: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> torch.Tensor:
        rotation, store, masks = launch
        query_SBHD, key_SBGD = rotate(query_SBHD, rotation), rotate(key_SBGD, rotation)
        if store is None:
            mask = masks[self.window]
        else:
            assert not masks, "a store says what its queries see"
            key_SBGD, value_SBGD, mask = store.extend(self.layer_number, key_SBGD, value_SBGD)
        context_BHSD = scaled_dot_product_attention(
            query_SBHD.permute(1, 2, 0, 3),
            key_SBGD.permute(1, 2, 0, 3),
            value_SBGD.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query_SBHD.shape[2] != key_SBGD.shape[2],
        )
        return context_BHSD.permute(2, 0, 1, 3).flatten(2)
