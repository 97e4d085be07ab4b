"""Runs rows through the layers and exits of a stage, with its own parameters.

Shapes: N rows, H hidden size, V the tokenizer's vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import embedding

from megatron_ee.inference.launch import Launch
from megatron_ee.inference.lean_layer import Attending, LeanLayer, LeanMlp, LeanNorm
from megatron_ee.inference.products import Products
from megatron_ee.inference.work import Work
from megatron_ee.model.exit_head import ExitHead
from megatron_ee.model.layers import Layer
from megatron_ee.model.stage import Stage


class Runner:
    """The lean walk. `Stage.run_layers`, `exit_features` and `project` say what it computes.

    Args:
        vocab_size: of the tokenizer: logits of rows beyond it, which are padding, are left out.
        packs: see `Product`.
        attending: the exits whose heads attend, those of other stages too; None: the stage is the whole model.

    Attributes:
        vocab_size: as given.
        work: what heads and projections have run; whoever makes launches counts those of layers.
    """

    def __init__(self, stage: Stage, vocab_size: int, *, packs: bool, attending: Collection[int] | None = None) -> None:
        self.stage, self.vocab_size = stage, vocab_size
        self.work = Work()
        self._group = stage.tp_group
        self._by_tensor_ranks = self._group.size() > 1
        products = Products(packs=packs)
        self._layers = {int(name): _lean(layer, int(name), stage, products) for name, layer in stage.layers.items()}
        rows = None if self._by_tensor_ranks else vocab_size
        self._exits = {int(layer): _Head(stage, int(layer), rows, products) for layer in stage.exits}
        own = {layer for layer, head in self._exits.items() if head.block is not None}
        self._attending = own if attending is None else attending

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids to the hidden states [N, H] that enter layer 1; of one token, where the table has it."""
        table = self.stage.embedding
        assert table is not None, "tokens enter at the first stage"
        if len(tokens) == 1 and not self._by_tensor_ranks:
            return table.weight.narrow(0, tokens[0], 1)
        tokens_N = torch.tensor(tokens, device=table.weight.device)
        return table(tokens_N[None])[0] if self._by_tensor_ranks else embedding(tokens_N, table.weight)

    def run(
        self, x_NH: torch.Tensor, launch: Attending, start: int, stop: int
    ) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
        """Run layers `start + 1` to `stop`. Returns the output [N, H], and what each exit on the way reads."""
        taps = {}
        for number in range(start + 1, stop + 1):
            x_NH, after_attention_NH = self._layers[number](x_NH, launch)
            if (head := self._exits.get(number)) is not None:
                taps[number] = after_attention_NH if head.reads_attention else x_NH
        return x_NH, taps

    def store(self, x_NH: torch.Tensor, launch: Launch, start: int, stop: int) -> None:
        """Give layers `start + 1` to `stop` the keys and values of a state as it is, without running them."""
        for number in range(start + 1, stop + 1):
            self._layers[number].store(x_NH, launch)

    def store_block(self, x_NH: torch.Tensor, launch: Launch, layer: int) -> None:
        """The same for the block in the head of the exit after `layer`."""
        block = self._exits[layer].block
        assert block is not None, f"exit {layer} does not attend"
        block.store(x_NH, launch)

    def features(self, hidden_NH: torch.Tensor, layer: int, launch: Launch | None = None) -> torch.Tensor:
        """What `project` takes, [N, H], from what the exit after `layer` reads.

        Args:
            launch: of these rows, for an exit that attends.
        """
        self.work.features[layer] += 1
        self.work.feature_rows[layer] += len(hidden_NH)
        return self._exits[layer].features(hidden_NH, launch)

    def project(self, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        """logits_NV of the exit after `layer`, or of the final output after the last, divided by its temperature."""
        self.work.projections[layer] += 1
        self.work.projected[layer] += len(features_NH)
        head = self._exits[layer]
        if head.temperature != 1.0:
            features_NH = features_NH / head.temperature
        if not self._by_tensor_ranks:
            return head.product(features_NH)
        share_NV = head.product(features_NH)
        shares = share_NV.new_empty(self._group.size() * len(share_NV), share_NV.shape[1])
        dist.all_gather_into_tensor(shares, share_NV, group=self._group)
        return shares.view(-1, *share_NV.shape).transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def gate_logits(self, hidden_NH: torch.Tensor, layer: int) -> torch.Tensor:
        """fp32 [N]: how sure the exit's gate is, before the sigmoid."""
        return self.stage.gate_logits(hidden_NH[:, None], layer)[:, 0]

    def attends(self, layer: int) -> bool:
        """Whether the exit after `layer` needs other positions than its own."""
        return layer in self._attending


class _Head:
    """An exit's parameters, as they are used here.

    Args:
        rows: how many of the projection's are used; None: all.
    """

    def __init__(self, stage: Stage, layer: int, rows: int | None, products: Products) -> None:
        head, config = stage.head(layer), stage.config
        eps, group = config.layernorm_epsilon, stage.tp_group
        self.reads_attention = stage.tap_of(layer).site == "attention"
        self.temperature = head.temperature
        self.product = products.of(stage.projection_weight(layer)[:rows])
        self.block = _lean(head.block, config.num_layers + layer, stage, products) if head.attends else None
        self._mlp = None
        if head.kind == "mlp":
            self._mlp = LeanMlp(head.pre_mlp_layernorm, head.mlp, eps, products, group)
        self._norm = _norm_of(head, stage, eps)

    def features(self, hidden_NH: torch.Tensor, launch: Launch | None) -> torch.Tensor:
        if self._mlp is not None:
            hidden_NH = self._mlp(hidden_NH)
        elif self.block is not None:
            assert launch is not None, "a block sees other positions"
            hidden_NH, _ = self.block(hidden_NH, launch)
        return self._norm(hidden_NH)


def _norm_of(head: ExitHead, stage: Stage, eps: float) -> LeanNorm:
    norm = head.norm if stage.norm is None else stage.norm
    assert norm is not None
    return LeanNorm(norm, eps)


def _lean(layer: torch.nn.Module, attention: int, stage: Stage, products: Products) -> LeanLayer:
    assert isinstance(layer, Layer)
    return LeanLayer(layer, attention, products, stage.tp_group)
