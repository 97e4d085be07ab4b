"""What the trainer is held against: the same model in plain PyTorch and Hugging Face's, each in a plain training loop.

They are written as somebody would write them who knows PyTorch and needs neither a pipeline nor a split matrix: fused
QKV and gate-up products, scaled_dot_product_attention, whole logits, one backward, AdamW(fused=True). They measure no
accuracy.

Shapes: B sequences, S positions, H hidden size, N query heads, G key-value heads, D head dimension, M micro-batches.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from megatron_ee.config import Config, ModelConfig

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from megatron_ee.data.batch import Batch

State = Mapping[str, torch.Tensor]
MicrobatchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The mean loss of a micro-batch, from its tokens and its labels, both [B, S]."""


class PlainModel(nn.Module):
    """A decoder with exits whose heads are norms before the shared projection."""

    def __init__(self, config: Config, state: State) -> None:
        super().__init__()
        model = config.model
        self.exit_layers = config.exits.layers
        self.embedding = nn.Embedding(int(model.vocab_size), model.hidden_size)
        self.layers = nn.ModuleList(_Layer(model) for _ in range(model.num_layers))
        self.norms = nn.ModuleDict({str(layer): _norm(model) for layer in (*config.exits.layers, model.num_layers)})
        self.output = nn.Linear(model.hidden_size, int(model.vocab_size), bias=False)
        angles = _angles(model, config.data.sequence_length)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.load_state_dict(_plain_state(state, model))

    def losses(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> dict[int, torch.Tensor]:
        """The mean cross-entropy of each exit."""
        x_BSH, losses = self.embedding(tokens_BS), {}
        for number, layer in enumerate(self.layers, start=1):
            x_BSH = layer(x_BSH, self.cos, self.sin)
            if str(number) in self.norms:
                logits_BSV = self.output(self.norms[str(number)](x_BSH))
                losses[number] = cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        return losses


class _Layer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.sizes = [heads * model.head_dim for heads in (model.num_attention_heads, *2 * [model.num_key_value_heads])]
        self.head_dim = model.head_dim
        self.attention_norm, self.mlp_norm = _norm(model), _norm(model)
        self.qkv = nn.Linear(model.hidden_size, sum(self.sizes), bias=False)
        self.projection = nn.Linear(self.sizes[0], model.hidden_size, bias=False)
        self.gate_up = nn.Linear(model.hidden_size, 2 * model.ffn_hidden_size, bias=False)
        self.down = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)

    def forward(self, x_BSH: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.attention_norm(x_BSH)).split(self.sizes, dim=-1)
        query_BNSD, key_BGSD, value_BGSD = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        context_BNSD = scaled_dot_product_attention(
            _rotate(query_BNSD, cos_SD, sin_SD),
            _rotate(key_BGSD, cos_SD, sin_SD),
            value_BGSD,
            is_causal=True,
            enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
        )
        x_BSH = x_BSH + self.projection(context_BNSD.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(silu(gate) * up)


def huggingface_model(config: Config, state: State) -> "LlamaForCausalLM":
    """Llama as transformers has it, without exits. Of itself it attends as `PlainModel` does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=int(model.vocab_size),
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            max_position_embeddings=config.data.sequence_length,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    llama.load_state_dict(_huggingface_state(state, model))
    return llama


class PlainLoop:
    """Micro-batch by micro-batch, then clip and update.

    Args:
        loss: of a micro-batch, by `model`.
    """

    def __init__(self, config: Config, model: nn.Module, loss: MicrobatchLoss) -> None:
        settings = config.optimizer
        self._parameters, self._loss, self._clip = list(model.parameters()), loss, settings.clip_grad_norm
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self._parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        betas = settings.beta1, settings.beta2
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon, fused=True)

    def step(self, batch: "Batch") -> float:
        """One update on a global batch; returns its loss."""
        total = torch.zeros(())
        for tokens_BS, labels_BS in zip(batch.tokens_MBS, batch.labels_MBS, strict=True):
            loss = self._loss(tokens_BS, labels_BS) / len(batch.tokens_MBS)
            torch.autograd.backward(loss)
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(total)


def plain_loop(config: Config, state: State) -> PlainLoop:
    """Of `PlainModel`, with the config's exits and the weights of their losses.

    Args:
        state: the parameters to begin with, under the names that `Stage` gives them.
    """
    model = PlainModel(config, state)
    weights = {**dict(zip(config.exits.layers, config.exits.weights, strict=True)), config.model.num_layers: 1.0}

    def loss(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        losses = model.losses(tokens_BS, labels_BS)
        return torch.stack([weight * losses[layer] for layer, weight in weights.items()]).sum()

    return PlainLoop(config, model, loss)


def huggingface_loop(config: Config, state: State) -> PlainLoop:
    """Of transformers' Llama and its own loss."""
    model = huggingface_model(config, state)

    def loss(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        # it would shift the labels of itself, and train on a token less
        value = model(input_ids=tokens_BS, labels=labels_BS, shift_labels=labels_BS).loss
        assert isinstance(value, torch.Tensor)
        return value

    return PlainLoop(config, model, loss)


def _norm(model: ModelConfig) -> nn.RMSNorm:
    return nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)


def _angles(model: ModelConfig, length: int) -> torch.Tensor:
    """[S, D]; the second half of the channels repeats the first."""
    channels = torch.arange(0, model.head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), model.rope_theta ** (-channels / model.head_dim))
    return torch.cat((angles, angles), dim=-1).float()


def _rotate(x_BNSD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD


def _plain_state(state: State, model: ModelConfig) -> dict[str, torch.Tensor]:
    names = {
        "input_layernorm.weight": "attention_norm.weight",
        "self_attention.linear_proj.weight": "projection.weight",
        "pre_mlp_layernorm.weight": "mlp_norm.weight",
        "mlp.linear_fc1.weight": "gate_up.weight",
        "mlp.linear_fc2.weight": "down.weight",
    }
    result = {name: state[name] for name in ("embedding.weight", "output.weight")}
    for layer in range(1, model.num_layers + 1):
        source, target = f"layers.{layer}.", f"layers.{layer - 1}."
        result[f"{target}qkv.weight"] = torch.cat(_query_key_value(state, layer, model))
        result.update({target + new: state[source + old] for old, new in names.items()})
    heads = [name for name in state if name.startswith("exits.")]
    return result | {name.replace("exits.", "norms.").replace(".norm.", "."): state[name] for name in heads}


def _huggingface_state(state: State, model: ModelConfig) -> dict[str, torch.Tensor]:
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    result = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state[f"exits.{model.num_layers}.norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for layer in range(1, model.num_layers + 1):
        source, target = f"layers.{layer}.", f"model.layers.{layer - 1}."
        for name, part in zip("qkv", _query_key_value(state, layer, model), strict=True):
            result[f"{target}self_attn.{name}_proj.weight"] = part
        for name, part in zip(("gate", "up"), state[f"{source}mlp.linear_fc1.weight"].chunk(2), strict=True):
            result[f"{target}mlp.{name}_proj.weight"] = part
        result.update({target + new: state[source + old] for old, new in names.items()})
    return result


def _query_key_value(state: State, layer: int, model: ModelConfig) -> list[torch.Tensor]:
    """megatron-core keeps them group by group: its queries, then its key and its value."""
    qkv = state[f"layers.{layer}.self_attention.linear_qkv.weight"]
    per_group = model.num_attention_heads // model.num_key_value_heads
    groups = qkv.view(model.num_key_value_heads, per_group + 2, model.head_dim, -1)
    return [part.flatten(0, 2) for part in torch.split(groups, [per_group, 1, 1], dim=1)]
