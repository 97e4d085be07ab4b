"""One stage of the model: some of its layers and exits. It does not know how it is scheduled.

Shapes: S positions, B sequences, H hidden size, V vocabulary. With tensor parallelism logits are this rank's share of
V, and with sequence parallelism hidden states are its share of S.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch.utils.checkpoint import checkpoint

from megatron_ee.config import ExitsConfig, ModelConfig
from megatron_ee.device import Device
from megatron_ee.model.attention import CoreAttention, KeyValueStore, Launch
from megatron_ee.model.deferred_weights import collect_products, deferring
from megatron_ee.model.exit_head import ExitHead, enter_projection
from megatron_ee.model.layer_drop import KeptRows, run_kept
from megatron_ee.model.layers import NOTHING_RECOMPUTED, Recompute, layer_parts, transformer_config
from megatron_ee.model.masks import Window, training_masks
from megatron_ee.model.rotary import Rotary
from megatron_ee.model.stage_parts import (
    make_embedding,
    make_exits,
    make_layers,
    make_shared_norm,
    make_shared_projection,
)
from megatron_ee.parallel.chunks import Chunk

_ENGINE_STATE = "_extra_state"  # Transformer Engine's fp8 scales: a checkpoint has to fit layers without it, too


class Tap(NamedTuple):
    """Where a hidden state was read: after layer `layer`, at its output or after its attention."""

    layer: int
    site: Literal["output", "attention"] = "output"


class Stage(MegatronModule):
    """The layers of one pipeline stage (all of them where there is one stage), and its exits.

    Layers keep their global numbers, so a parameter has the same name on whatever stage it is: `embedding.*`,
    `layers.7.*`, `exits.6.norm.*`. The projection that the final output and other exits share is `output`, on each
    stage that needs it; one that is tied to the embedding is borrowed from it where the stage has it. A norm that all
    exits share is `norm`, likewise.

    Args:
        chunks: the parts of the model that this stage holds: one, or several where the schedule goes round the stages.
        vocab_size: the resolved size (the model config may say `auto`).
        groups: megatron-core's process groups; matrices are split over `groups.tp`.
        sequence_parallel: between matrices, split positions over `groups.tp` too.
        defer_weight_gradients: a backward leaves the gradients of the layers' matrices in `weight_products`.
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
        recompute: Recompute = NOTHING_RECOMPUTED,
        defer_weight_gradients: bool = False,
    ) -> None:
        config = transformer_config(
            model,
            dtype,
            tensor_size=groups.tp.size(),
            sequence_parallel=sequence_parallel,
            recomputed_modules=recompute.by_megatron,
        )
        super().__init__(config)
        self.chunks, self.model, self.groups, self.recompute = tuple(chunks), model, groups, recompute
        self.tp_group = groups.tp
        parts = layer_parts(device, model)
        self._attention = parts.context
        self._attention.recomputes = "core_attn" in recompute.modules
        self._rotary = Rotary(model, device.torch)
        has_embedding = any(chunk.has_embedding for chunk in chunks)
        self.embedding = make_embedding(config, groups, vocab_size) if has_embedding else None
        self.layers = make_layers(chunks, config, deferring(parts) if defer_weight_gradients else parts, groups)
        self.weight_products = collect_products(self.layers) if defer_weight_gradients else None
        own_exits = [layer for chunk in chunks for layer in chunk.exits]
        self.has_final_exit = model.num_layers in own_exits
        self.exits = make_exits(own_exits, exits, config, parts, groups, vocab_size)
        self.norm = make_shared_norm(own_exits, exits, config, parts)
        borrows = model.tie_embeddings and has_embedding
        self.output = make_shared_projection(own_exits, exits, config, groups, vocab_size, borrows=borrows)
        self._mark_copies()
        self.to(device.torch)

    @property
    def shared_weight(self) -> torch.nn.Parameter | None:
        """This stage's copy of the weight that several stages may hold: the output projection's, which is also the
        embedding's where the two are tied."""
        if self.model.tie_embeddings and self.embedding is not None:
            return self.embedding.weight
        return self.output.weight if self.output is not None else None

    @property
    def shared_parameters(self) -> dict[str, torch.nn.Parameter]:
        """This stage's copies of what several stages may hold, under names that all stages give them."""
        norm = self.norm.weight if self.norm is not None else None
        copies = {"output": self.shared_weight, "norm": norm}
        return {name: copy for name, copy in copies.items() if isinstance(copy, torch.nn.Parameter)}

    @property
    def attention_windows(self) -> Mapping[int, Window]:
        """The numbers under which a `KeyValueStore` hears of this stage's attentions, those of its layers, and beyond
        the model's last layer those of exit heads; and the window of each."""
        attentions = [module for module in self.modules() if isinstance(module, CoreAttention)]
        return {attention.layer_number: attention.window for attention in attentions}

    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Token ids (int64) to the hidden states x_SBH that enter layer 1."""
        assert self.embedding is not None, "tokens enter at the first stage"
        embedded = self.embedding(tokens_BS)
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def run_layers(
        self,
        x_SBH: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        stop: int,
        *,
        documents_BS: torch.Tensor | None = None,
        store: KeyValueStore | None = None,
        kept: KeptRows | None = None,
    ) -> tuple[torch.Tensor, dict[Tap, torch.Tensor]]:
        """Run layers `start + 1` to `stop`: the one forward path of training, evaluation and decoding.

        Args:
            positions: int64 [S] of all positions, or [S, B] where sequences are at different ones.
            start: number of layers that x has been through.
            documents_BS: which document of its sequence each of all positions is of: none is seen from another. None:
                a sequence is one.
            store: past keys and values, for decoding; None: causal attention within x.
            kept: which sequences run a layer, in training with layer dropout.

        Returns:
            The output [S, B, H], and the hidden state at each exit passed. An exit on a chunk's input is passed when
            `start` is where the chunk begins.
        """
        windows = {self.model.window_of(layer) for layer in range(start + 1, stop + 1)}
        launch = self._launch(positions, documents_BS, store, windows)
        taps = {}
        if any(start == chunk.start and start in chunk.exits for chunk in self.chunks):
            taps[Tap(start)] = x_SBH
        for layer in range(start + 1, stop + 1):
            tap = self.tap_of(layer) if str(layer) in self.exits else None
            shows_attention = tap is not None and tap.site == "attention"
            rows_K = kept.get(layer) if kept else None
            x_SBH, after_attention_SBH = self._run_layer(layer, x_SBH, launch, rows_K, shows_attention=shows_attention)
            if tap is not None:
                taps[tap] = after_attention_SBH if shows_attention else x_SBH
        return x_SBH, taps

    def tap_of(self, layer: int) -> Tap:
        """Where the exit after `layer` reads."""
        return Tap(layer, "attention" if self.head(layer).kind == "mlp" else "output")

    def head(self, layer: int) -> ExitHead:
        """The exit after `layer`, which this stage has."""
        head = self.exits[str(layer)]
        assert isinstance(head, ExitHead)
        return head

    def exit_features(
        self,
        hidden_SBH: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
        *,
        documents_BS: torch.Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> torch.Tensor:
        """What `project` takes, [S, B, H], from the hidden state at the exit's tap; other arguments as those of
        `run_layers`."""
        head = self.head(layer)
        if head.attends:
            self._attention.launch = self._launch(positions, documents_BS, store, {self.model.window_of(layer)})
        features_SBH = head.features(hidden_SBH)
        return features_SBH if self.norm is None else self.norm(features_SBH)

    def project(self, features_SBH: torch.Tensor, layer: int) -> torch.Tensor:
        """logits_SBV of the features of the exit after `layer`, divided by its temperature."""
        projection, weight = self._projection(layer)
        logits_SBV, _ = projection(self._cooled(features_SBH, layer), weight=weight)
        return logits_SBV

    def projection_input(self, features_SBH: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of `project`, for a loss that computes the product piece by piece: features of all positions, and
        the rows [V, H] of the exit's projection."""
        weight = self.projection_weight(layer)
        return enter_projection(self._cooled(features_SBH, layer), self.config, self.groups), weight

    def projection_weight(self, layer: int) -> torch.Tensor:
        """[V, H]: this rank's rows of the projection of the exit after `layer`, which may be the embedding's."""
        _, weight = self._projection(layer)
        return weight

    def gate_logits(self, hidden_SBH: torch.Tensor, layer: int) -> torch.Tensor:
        """fp32 [S, B] of all positions, from the hidden state at the exit's tap: how sure its gate is, before the
        sigmoid, that the exit is right."""
        gate = self.head(layer).gate
        assert gate is not None, f"exit {layer} has no gate"
        logits_SB: torch.Tensor = gate(hidden_SBH)
        return logits_SB

    def exit_logits(self, hidden_SBH: torch.Tensor, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """logits_SBV of the exit after `layer`, or of the final output after the last, from what its tap has of all
        positions of a sequence."""
        return self.project(self.exit_features(hidden_SBH, layer, positions), layer)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """What this stage contributes to a checkpoint, under the names that do not depend on the layout."""
        state: ShardedStateDict = {}
        for name, child in self.named_children():
            parts = child.items() if isinstance(child, torch.nn.ModuleDict) else [("", child)]
            for number, module in parts:
                path = f"{name}.{number}." if number else f"{name}."
                state.update(sharded_state_dict_default(module, path, sharded_offsets, metadata, self.tp_group))
        state = {name: entry for name, entry in state.items() if not name.endswith(_ENGINE_STATE)}
        for name, entry in state.items():
            entry.key = prefix + self.global_name(name)
            is_copy = name.startswith("norm.") and not self.has_final_exit
            if is_copy or (name.startswith("output.") and self._holds_copy):
                _mark_as_copy(entry, self.chunks[-1])
        return {prefix + name: entry for name, entry in state.items()}

    def global_name(self, name: str) -> str:
        """A parameter's name in the whole model and on disk: the final exit's head loses its number, as everyone knows
        it, and what is tied to the embedding is the embedding's."""
        name = name.removeprefix(f"exits.{self.model.num_layers}.")
        return name.replace("output.", "embedding.", 1) if self.model.tie_embeddings and name[:7] == "output." else name

    def load_sharded(self, state: dict[str, torch.Tensor], *, is_whole: bool = True) -> None:
        """Take back what `sharded_state_dict` described, or a part of it, under this stage's own names."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = missing if is_whole else []
        different = [name for name in (*missing, *unexpected) if not name.endswith(_ENGINE_STATE)]
        assert not different, f"not in both the stage and the checkpoint: {different}"

    @property
    def _holds_copy(self) -> bool:
        """Whether another stage holds the original of this stage's `output`."""
        return self.model.tie_embeddings or not self.has_final_exit

    def _mark_copies(self) -> None:
        """megatron-core counts a parameter's gradient in the norm only where it is not `shared`, and gives one that is
        a `shared_embedding` a gradient bucket of its own, so that its copies are cut alike over data ranks."""
        for parameter in self.shared_parameters.values():
            parameter.shared_embedding = True  # type: ignore[attr-defined]
        if self.output is not None and self.output.weight is not None:
            self.output.weight.shared = self._holds_copy
        if self.norm is not None:
            self.norm.weight.shared = not self.has_final_exit  # type: ignore[union-attr]

    def _launch(
        self,
        positions: torch.Tensor,
        documents_BS: torch.Tensor | None,
        store: KeyValueStore | None,
        windows: Collection[Window],
    ) -> Launch:
        rotation = self._rotary.at(positions, self.config.params_dtype)
        if store is not None:
            return Launch(rotation, store)
        return Launch(rotation, masks=training_masks(windows, len(positions), documents_BS, like=rotation.cosine))

    def _run_layer(
        self, layer: int, x_SBH: torch.Tensor, launch: Launch, rows_K: torch.Tensor | None, *, shows_attention: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if rows_K is None:
            return self._run_rows(layer, x_SBH, launch)
        run = partial(self._run_rows, layer, launch=launch.of_rows(rows_K))
        return run_kept(run, x_SBH, rows_K, shows_attention=shows_attention)

    def _run_rows(self, layer: int, x_SBH: torch.Tensor, launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
        def run(x_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self._attention.launch = launch  # also when it runs again, in a backward
            return self.layers[str(layer)](x_SBH)

        if self.recompute.layers and torch.is_grad_enabled():
            return checkpoint(run, x_SBH, use_reentrant=False, preserve_rng_state=False)
        return run(x_SBH)

    def _cooled(self, features_SBH: torch.Tensor, layer: int) -> torch.Tensor:
        """Dividing features divides logits, H numbers a row instead of V, for all who look at logits."""
        temperature = self.head(layer).temperature
        return features_SBH if temperature == 1.0 else features_SBH / temperature

    def _projection(self, layer: int) -> tuple[ColumnParallelLinear, torch.Tensor]:
        projection = self.head(layer).output or self.output
        assert projection is not None, f"exit {layer} is not on this stage"
        if projection.weight is not None:
            return projection, projection.weight
        assert self.embedding is not None
        return projection, self.embedding.weight


def _mark_as_copy(entry: ShardedBase, last: Chunk) -> None:
    """Another stage writes the shared weight; this one holds a replica of it."""
    _, tensor_rank, data_rank = entry.replica_id
    entry.replica_id = (last.stop, tensor_rank, data_rank)
