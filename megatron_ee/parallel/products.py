"""How many multiply-adds the matrix products of one token's forward take: what speed, balance and MFU are counted in.

Attention counts all pairs of positions, though a causal kernel skips half of them; within a window, as many for each
query as the window is wide. Norms, rotary positions, biases, activation functions and look-ups are no matrix products.
"""

from collections.abc import Iterable

from megatron_ee.config import HeadKind, ModelConfig

MULTIPLY_AND_ADD = 2
BACKWARD = 2
"""A product of the forward counts twice more in the backward: for its input's gradient and for its weight's."""


GATE_SHARE = 4
"""An MLP gate is one part in so many as wide as the model."""


def gate_width(hidden_size: int) -> int:
    """The inner width of an MLP gate."""
    return max(1, hidden_size // GATE_SHARE)


def positions_seen(model: ModelConfig, sequence_length: int, layers: Iterable[int]) -> float:
    """How many positions a query attends to, as it is counted here, on average over these layers."""
    seen = [min(sequence_length, model.window_of(layer) or sequence_length) for layer in layers]
    return sum(seen) / len(seen)


def layer_products(model: ModelConfig, seen: float) -> float:
    """Of one layer: attention and MLP.

    Args:
        seen: positions that a query attends to.
    """
    query_width = model.num_attention_heads * model.head_dim
    key_value_width = 2 * model.num_key_value_heads * model.head_dim
    projections = model.hidden_size * (2 * query_width + key_value_width)
    return projections + core_attention_products(model, seen) + mlp_products(model)


def core_attention_products(model: ModelConfig, seen: float) -> float:
    """Of attention's scores and values, without its projections."""
    return 2 * seen * model.num_attention_heads * model.head_dim


def mlp_products(model: ModelConfig) -> int:
    """Of one MLP; SwiGLU has three matrices."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def head_products(model: ModelConfig, kind: HeadKind, seen: float, vocab_size: int) -> float:
    """Of an exit's head, with its projection. A gate beside it has H products, or H^2 / 4, and isn't counted."""
    before = {"norm": 0, "mlp": mlp_products(model), "block": layer_products(model, seen)}
    return before[kind] + model.hidden_size * vocab_size
