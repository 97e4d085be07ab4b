"""Core attention on torch's scaled_dot_product_attention: rotary positions, with or without a key-value store.

Shapes: S query positions, T positions attended to, B batch, H query heads, G key-value heads, D head dimension.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_ee.model.rotary import Rotation, rotate


class KeyValueStore(Protocol):
    """Past keys and values of a sequence, for the layers that run with it."""

    def extend(
        self, layer: int, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Store this launch's keys and values; return all that its queries may see.

        Returns:
            key [T, B, G, D], value [T, B, G, D], and a boolean mask [S, T]: true where query s sees position t.
        """
        ...


class Launch(NamedTuple):
    """What the attentions of all layers that run together have in common.

    Attributes:
        store: past keys and values; None: causal self-attention within the sequence.
        mask_B1SS: added to a query's scores; None: it sees every position up to its own. Not with a store.
    """

    rotation: Rotation
    store: KeyValueStore | None = None
    mask_B1SS: torch.Tensor | None = None

    def of_rows(self, rows_K: torch.Tensor) -> "Launch":
        """The launch of some of the sequences only; not with a store."""
        assert self.store is None, "layers are skipped in training only"
        mask_K1SS = None if self.mask_B1SS is None else self.mask_B1SS.index_select(0, rows_K)
        if self.rotation.cosine.shape[1] == 1:  # all sequences are at the same positions
            return self._replace(mask_B1SS=mask_K1SS)
        rotation = Rotation(*(part.index_select(1, rows_K) for part in self.rotation))
        return Launch(rotation, mask_B1SS=mask_K1SS)


def mask_within_documents(documents_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mask_B1SS of sequences that hold several documents: a query sees what is not after it, of its own document.

    It is S^2 numbers a sequence, made once for all layers of a launch: 0 where a query sees a position, minus infinity
    elsewhere. (Of a boolean one torch would make these numbers in each layer, and keep them until its backward.) A mask
    keeps torch from the fastest kernels of a GPU, which take lengths of documents instead (torch.nn.attention.varlen):
    `CoreAttention` is the place to call them.

    Args:
        documents_BS: integers; positions of one document have the same.
        dtype: of the queries.
    """
    length = documents_BS.shape[1]
    past_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril()
    sees_B1SS = (documents_BS[:, None, :, None] == documents_BS[:, None, None, :]) & past_SS
    return torch.zeros(sees_B1SS.shape, dtype=dtype, device=sees_B1SS.device).masked_fill_(~sees_B1SS, -torch.inf)


class AttentionContext:
    """Tells attentions which launch they are part of: megatron-core's layers between hand nothing through.

    Whoever runs a layer sets it just before.

    Attributes:
        recomputes: whether the backward of an attention computes it again, instead of keeping what it made.
    """

    launch: Launch
    recomputes = False


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
        rotation, store, mask = launch
        query_SBHD, key_SBGD = rotate(query_SBHD, rotation), rotate(key_SBGD, rotation)
        if store is not None:
            assert mask is None, "a store says what its queries see"
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
