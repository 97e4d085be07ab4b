"""The model once more in plain torch, without megatron-core and without any split: the oracle of the real one."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, silu

from megatron_ee.config import ExitsConfig, ModelConfig

Parameters = Mapping[str, torch.Tensor]


def exit_logits(
    parameters: Parameters,
    model: ModelConfig,
    exits: ExitsConfig,
    tokens_BS: torch.Tensor,
    *,
    shared: Mapping[int, torch.Tensor] | None = None,
    norms: Mapping[int, torch.Tensor] | None = None,
    skipped: Sequence[Collection[int]] | None = None,
) -> dict[int, torch.Tensor]:
    """Logits [B, S, V] of each exit, the final one under the number of layers.

    Args:
        shared: for each exit, what it uses as the shared projection, instead of the one in `parameters`.
        norms: for each exit, what it uses as the shared norm, likewise.
        skipped: the layers that each sequence skips; sequences then run one by one.
    """
    return exit_outputs(parameters, model, exits, tokens_BS, shared=shared, norms=norms, skipped=skipped).logits


class Outputs(NamedTuple):
    """By exit: its logits [B, S, V], and those of its gate [B, S] where it has one."""

    logits: dict[int, torch.Tensor]
    gates: dict[int, torch.Tensor]


def exit_outputs(
    parameters: Parameters,
    model: ModelConfig,
    exits: ExitsConfig,
    tokens_BS: torch.Tensor,
    *,
    shared: Mapping[int, torch.Tensor] | None = None,
    norms: Mapping[int, torch.Tensor] | None = None,
    skipped: Sequence[Collection[int]] | None = None,
) -> Outputs:
    """Arguments as those of `exit_logits`."""
    if skipped is None:
        return _exit_outputs(parameters, model, exits, tokens_BS, shared, norms, ())
    alone = [
        _exit_outputs(parameters, model, exits, tokens_S[None], shared, norms, layers)
        for tokens_S, layers in zip(tokens_BS, skipped, strict=True)
    ]
    logits, gates = (
        {layer: torch.cat([outputs[kind][layer] for outputs in alone]) for layer in alone[0][kind]} for kind in (0, 1)
    )
    return Outputs(logits, gates)


def _exit_outputs(
    parameters: Parameters,
    model: ModelConfig,
    exits: ExitsConfig,
    tokens_BS: torch.Tensor,
    shared: Mapping[int, torch.Tensor] | None,
    norms: Mapping[int, torch.Tensor] | None,
    skipped: Collection[int],
) -> Outputs:
    x = parameters["embedding.weight"][tokens_BS]
    if shared is None:
        weight = parameters["embedding.weight" if model.tie_embeddings else "output.weight"]
        shared = dict.fromkeys([*exits.layers, model.num_layers], weight)
    if norms is None:
        names = {layer: "norm" if exits.norm == "shared" else f"exits.{layer}.norm" for layer in exits.layers}
        names[model.num_layers] = "norm"
        norms = {layer: parameters[f"{name}.weight"] for layer, name in names.items()}
    logits, gates = {}, {}
    for layer in range(1, model.num_layers + 1):
        after_attention = x
        if layer not in skipped:
            after_attention = x + _attention_branch(parameters, f"layers.{layer}.", model, x)
            x = after_attention + _mlp_branch(parameters, f"layers.{layer}.", model, after_attention)
        if layer in exits.layers:
            features = _head(parameters, f"exits.{layer}.", model, exits.head_of(layer), x, after_attention)
            own = exits.projection_of(layer) == "own"
            projection = parameters[f"exits.{layer}.output.weight"] if own else shared[layer]
            features = _norm(features, norms[layer], model.norm_epsilon)
            logits[layer] = features @ projection.T / exits.temperature_of(layer)
            if exits.gate_of(layer) != "none":
                tap = after_attention if exits.head_of(layer) == "mlp" else x
                gates[layer] = _gate(parameters, f"exits.{layer}.gate.", model, exits.gate_of(layer), tap.detach())
    logits[model.num_layers] = _norm(x, norms[model.num_layers], model.norm_epsilon) @ shared[model.num_layers].T
    return Outputs(logits, gates)


def token_losses(
    logits: Mapping[int, torch.Tensor], layer: int, exits: ExitsConfig, labels_BS: torch.Tensor
) -> torch.Tensor:
    """What an exit is trained on at each token, [B, S]: the formulas of design section 3."""
    losses_BS = cross_entropy(logits[layer].transpose(1, 2), labels_BS, reduction="none")
    if layer not in exits.layers:
        return losses_BS
    if (distillation := exits.distillation) is not None:
        share, heat = distillation.weight, distillation.temperature
        wanted = (logits[max(logits)].detach() / heat).softmax(-1)
        gap = wanted.log() - (logits[layer] / heat).softmax(-1).log()
        losses_BS = (1 - share) * losses_BS + share * heat**2 * (wanted * gap).sum(-1)
    if exits.token_weights == "max_probability":
        losses_BS = losses_BS * logits[layer].softmax(-1).max(-1).values.detach()
    return losses_BS


def gate_losses(outputs: Outputs, layer: int, exits: ExitsConfig, labels_BS: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of a gate at each token, [B, S]; a false exit costs more."""
    logits = outputs.logits
    wanted_BS = labels_BS if exits.gate_loss.target == "label" else logits[max(logits)].argmax(-1)
    right_BS = (logits[layer].argmax(-1) == wanted_BS).float()
    costs_BS = right_BS + exits.gate_loss.false_exit_cost * (1 - right_BS)
    gates_BS = outputs.gates[layer]
    return binary_cross_entropy_with_logits(gates_BS, right_BS, weight=costs_BS, reduction="none")


def weighted_loss(
    logits: Mapping[int, torch.Tensor], labels_BS: torch.Tensor, mask_BS: torch.Tensor, weights: Mapping[int, float]
) -> torch.Tensor:
    """sum_e w_e CE_e, each CE a mean over the unmasked tokens."""
    total = torch.zeros(())
    for layer, weight in weights.items():
        losses = cross_entropy(logits[layer].flatten(0, 1), labels_BS.flatten(), reduction="none")
        total = total + weight * (losses * mask_BS.flatten()).sum() / mask_BS.sum()
    return total


def _head(
    parameters: Parameters, prefix: str, model: ModelConfig, kind: str, x: torch.Tensor, after_attention: torch.Tensor
) -> torch.Tensor:
    if kind == "mlp":
        return after_attention + _mlp_branch(parameters, prefix, model, after_attention)
    if kind == "block":
        x = x + _attention_branch(parameters, f"{prefix}block.", model, x)
        return x + _mlp_branch(parameters, f"{prefix}block.", model, x)
    return x


def _gate(parameters: Parameters, prefix: str, model: ModelConfig, kind: str, x: torch.Tensor) -> torch.Tensor:
    x = _norm(x, parameters[f"{prefix}norm.weight"], model.norm_epsilon)
    if kind == "mlp":
        x = silu(x @ parameters[f"{prefix}hidden.weight"].T + parameters[f"{prefix}hidden.bias"])
    return (x @ parameters[f"{prefix}output.weight"].T + parameters[f"{prefix}output.bias"]).squeeze(-1)


def _attention_branch(parameters: Parameters, prefix: str, model: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    normed = _norm(x, parameters[f"{prefix}input_layernorm.weight"], model.norm_epsilon)
    prefix, layer = f"{prefix}self_attention.", int(prefix.split(".")[1])
    mixed = normed @ parameters[f"{prefix}linear_qkv.weight"].T
    if model.qkv_bias:
        mixed = mixed + parameters[f"{prefix}linear_qkv.bias"]
    query, key, value = _heads(mixed, model)
    if model.qk_norm:
        query, key = (
            _norm(heads, parameters[f"{prefix}{name}_layernorm.weight"], model.norm_epsilon)
            for name, heads in (("q", query), ("k", key))
        )
    return _attention(query, key, value, model, layer) @ parameters[f"{prefix}linear_proj.weight"].T


def _mlp_branch(parameters: Parameters, prefix: str, model: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    normed = _norm(x, parameters[f"{prefix}pre_mlp_layernorm.weight"], model.norm_epsilon)
    gate, up = (normed @ parameters[f"{prefix}mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return (silu(gate) * up) @ parameters[f"{prefix}mlp.linear_fc2.weight"].T


def _heads(mixed: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, S, groups, a group's heads, D]; keys and values [B, S, groups, D]."""
    groups, per_group = model.num_key_value_heads, model.num_attention_heads // model.num_key_value_heads
    mixed = mixed.unflatten(-1, (groups, per_group + 2, model.head_dim))  # a group's queries, then its key and value
    return mixed[..., :per_group, :], mixed[..., per_group, :], mixed[..., per_group + 1, :]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, model: ModelConfig, layer: int
) -> torch.Tensor:
    query, key = _rotate(query, model), _rotate(key.unsqueeze(3), model).squeeze(3)
    scores = torch.einsum("bsgqd,btgd->bgqst", query, key) / model.head_dim**0.5
    windowed = model.sliding_window_layers == "all" or layer in model.sliding_window_layers
    window = model.sliding_window if windowed else None
    ago = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    hidden = (ago < 0) if window is None else (ago < 0) | (ago >= window)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bgqst,btgd->bsgqd", shares, value).flatten(2)


def _rotate(x: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """x [B, S, ...heads, D]: channel i turns with channel i + D/2."""
    size, factor = model.head_dim, 1.0
    frequencies = torch.tensor([_frequency(channel, model) for channel in range(size // 2)], dtype=torch.float64)
    if model.rope_scaling is not None and model.rope_scaling.kind == "yarn":
        factor = model.rope_scaling.attention_factor or 1 + math.log(model.rope_scaling.factor) / 10
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies).to(x.dtype)
    cos, sin = (factor * part.view(1, x.shape[1], 1, 1, size // 2) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequency(channel: int, model: ModelConfig) -> float:
    """Radians a position: those of low frequency are divided by the factor, those of high ones are not."""
    plain = model.rope_theta ** (-2 * channel / model.head_dim)
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    length = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        waves = length * plain / (2 * math.pi)
        if waves <= scaling.low_freq_factor:
            return plain / scaling.factor
        if waves >= scaling.high_freq_factor:
            return plain
        high = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return high * plain + (1 - high) * plain / scaling.factor
    # the channel c at which length * theta ** (-2 c / D) = 2 pi * turns
    ends = [
        model.head_dim / 2 * math.log(length / (2 * math.pi * turns), model.rope_theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    ]
    start, end = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    start, end = max(start, 0), min(end, model.head_dim - 1)
    low = min(max((channel - start) / (end - start), 0), 1) if start != end else float(channel > start)
    return (1 - low) * plain + low * plain / scaling.factor


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
