"""One stage of the model: some of its layers and exits. It does not know how it is scheduled.

Shapes: S positions, B sequences, H hidden size, V vocabulary. With tensor parallelism logits are this rank's share of
V, and with sequence parallelism hidden states are its share of S.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_ee.config import ExitsConfig, ModelConfig
from megatron_ee.device import Device
from megatron_ee.model.attention import KeyValueStore
from megatron_ee.model.exit_head import ExitHead, make_projection
from megatron_ee.model.layers import layer_parts, layer_spec, transformer_config
from megatron_ee.model.rotary import rotary_angles
from megatron_ee.parallel.layout import Chunk

_ENGINE_STATE = "_extra_state"  # Transformer Engine's fp8 scales: a checkpoint has to fit layers without it, too


class Tap(NamedTuple):
    """Where a hidden state was read: after layer `layer`, at its output or after its attention."""

    layer: int
    site: Literal["output", "attention"] = "output"


class Stage(MegatronModule):
    """The layers of one pipeline stage (all of them where there is one stage), and its exits.

    Layers keep their global numbers, so a parameter has the same name on whatever stage it is:
    `embedding.*`, `layers.7.*`, `exits.6.norm.*`, and `output.*` for the projection that exits share.

    Args:
        chunks: the parts of the model that this stage holds: one, or several where the schedule goes round the stages.
        vocab_size: the resolved size (the model config may say `auto`).
        groups: megatron-core's process groups; matrices are split over `groups.tp`.
        sequence_parallel: between matrices, split positions over `groups.tp` too.
    """

    def __init__(
        self,
        model: ModelConfig,
        exits: ExitsConfig,
        chunks: Sequence[Chunk],
        *,
        vocab_size: int,
        groups: ProcessGroupCollection,
        device: Device,
        dtype: torch.dtype = torch.float32,
        sequence_parallel: bool = False,
    ) -> None:
        config = transformer_config(model, dtype, tensor_size=groups.tp.size(), sequence_parallel=sequence_parallel)
        super().__init__(config)
        self.chunks, self.model = tuple(chunks), model
        self.tp_group = groups.tp
        parts = layer_parts(device)
        if any(chunk.has_embedding for chunk in chunks):
            self.embedding = VocabParallelEmbedding(
                vocab_size,
                model.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=sequence_parallel,
                config=config,
                tp_group=groups.tp,
            )
        own_layers = [layer for chunk in chunks for layer in range(chunk.start + 1, chunk.stop + 1)]
        own_exits = [layer for chunk in chunks for layer in chunk.exits]
        self.has_final_exit = model.num_layers in own_exits
        spec = layer_spec(parts)
        self.layers = torch.nn.ModuleDict(
            {
                str(layer): build_module(spec, config=config, layer_number=layer, pg_collection=groups)
                for layer in own_layers
            }
        )
        self.output: ColumnParallelLinear | None = None
        if exits.projection == "shared" and own_exits:
            self.output = make_projection(config, groups, vocab_size)
            # megatron-core counts a parameter's gradient in the norm only where it is not `shared`
            self.output.weight.shared = not self.has_final_exit
            self.output.weight.shared_embedding = True

        def head() -> ExitHead:
            return ExitHead(config, parts, groups, vocab_size=vocab_size, shared_projection=self.output)

        self.exits = torch.nn.ModuleDict({str(layer): head() for layer in own_exits})
        self.to(device.torch)

    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Token ids (int64) to the hidden states x_SBH that enter layer 1."""
        embedded = self.embedding(tokens_BS)
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def run_layers(
        self,
        x_SBH: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        stop: int,
        *,
        store: KeyValueStore | None = None,
    ) -> tuple[torch.Tensor, dict[Tap, torch.Tensor]]:
        """Run layers `start + 1` to `stop`: the one forward path of training, evaluation and decoding.

        Args:
            positions: int64 [S] of all positions, or [S, B] where sequences are at different ones.
            start: number of layers that x has been through.
            store: past keys and values, for decoding; None: causal attention within x.

        Returns:
            The output [S, B, H], and the hidden state at each exit passed. An exit on a chunk's input is passed when
            `start` is where the chunk begins.
        """
        angles = rotary_angles(positions, self.model.head_dim, self.model.rope_theta)
        taps = {}
        if any(start == chunk.start and start in chunk.exits for chunk in self.chunks):
            taps[Tap(start)] = x_SBH
        for layer in range(start + 1, stop + 1):
            x_SBH, _ = self.layers[str(layer)](x_SBH, attention_mask=store, rotary_pos_emb=angles)
            if str(layer) in self.exits:
                taps[Tap(layer)] = x_SBH
        return x_SBH, taps

    def exit_logits(self, hidden_SBH: torch.Tensor, layer: int) -> torch.Tensor:
        """logits_SBV of the exit after `layer`; the model's last layer is the final output."""
        return self.exits[str(layer)](hidden_SBH, self.output)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """What this stage contributes to a checkpoint, under the names that do not depend on the layout.

        The final exit's head loses its number on disk: `norm.weight` and `output.weight`, as everyone knows them.
        """
        state: ShardedStateDict = {}
        for name, child in self.named_children():
            parts = child.items() if isinstance(child, torch.nn.ModuleDict) else [("", child)]
            for number, module in parts:
                path = f"{name}.{number}." if number else f"{name}."
                state.update(sharded_state_dict_default(module, path, sharded_offsets, metadata, self.tp_group))
        final = f"exits.{self.model.num_layers}."
        state = {name: entry for name, entry in state.items() if not name.endswith(_ENGINE_STATE)}
        for entry in state.values():
            entry.key = prefix + entry.key.removeprefix(final)
        if self.output is not None and not self.has_final_exit:
            for name in [name for name in state if name.startswith("output.")]:
                _mark_as_copy(state[name], self.chunks[-1])
        return {prefix + name: entry for name, entry in state.items()}

    def load_sharded(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `sharded_state_dict` described, under this stage's own names."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        different = [name for name in (*missing, *unexpected) if not name.endswith(_ENGINE_STATE)]
        assert not different, f"not in both the stage and the checkpoint: {different}"


def _mark_as_copy(entry: ShardedBase, last: Chunk) -> None:
    """The final exit's stage writes the shared projection; others hold replicas of it."""
    _, tensor_rank, data_rank = entry.replica_id
    entry.replica_id = (last.stop, tensor_rank, data_rank)
