"""Which of Hugging Face's tensors each of our parameters is made of, and back; names and shapes alone.

A parameter is rows of those tensors, one after another: all of one; a gate's and then what it gates (linear_fc1); or,
for each key-value group in turn, the queries of its heads, its key, and its value (linear_qkv). A layer's number counts
from 1 in our names and from 0 in theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ee.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start` to `stop` - 1 of one of their tensors, beginning at row `at` of our parameter."""

    tensor: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one of our parameters is made.

    Attributes:
        name: in our terms, that of the whole model's parameter.
        shape: of the whole parameter, as if it were not split over ranks.
        tensors: theirs, with their shapes.
        pieces: what its rows are, from the first to the last.
    """

    name: str
    shape: Shape
    tensors: Mapping[str, Shape]
    pieces: tuple[Piece, ...]

    def rows(self, start: int, stop: int) -> Iterator[Piece]:
        """What the rows `start` to `stop` - 1 are; `at` counts from `start`."""
        for piece in self.pieces:
            first, last = max(start, piece.at), min(stop, piece.at + piece.stop - piece.start)
            if first < last:
                begin = piece.start + first - piece.at
                yield Piece(piece.tensor, begin, begin + last - first, first - start)

    def back(self, tensor: str) -> Iterator[Piece]:
        """What one of their tensors is, from its first row to its last: rows of our parameter, at rows of theirs."""
        for piece in sorted(self.pieces, key=lambda piece: piece.start):
            if piece.tensor == tensor:
                yield Piece(self.name, piece.at, piece.at + piece.stop - piece.start, piece.start)


def recipes_of(model: ModelConfig) -> dict[str, Recipe]:
    """Every parameter of the model but its exits', by its name, in the order of the model.

    Args:
        model: its vocabulary resolved.
    """
    assert isinstance(model.vocab_size, int)
    table = (model.vocab_size, model.hidden_size)
    found = [_whole("embedding.weight", "model.embed_tokens.weight", table)]
    for layer in range(1, model.num_layers + 1):
        found += layer_recipes(model, f"layers.{layer}.", layer)
    found.append(_whole("norm.weight", "model.norm.weight", (model.hidden_size,)))
    if not model.tie_embeddings:
        found.append(_whole("output.weight", "lm_head.weight", table))
    return {recipe.name: recipe for recipe in found}


def layer_recipes(model: ModelConfig, prefix: str, layer: int) -> list[Recipe]:
    """The parameters of a transformer layer.

    Args:
        prefix: what our names begin with: `layers.7.`, or `exits.6.block.`.
        layer: whose layer it is for them, from 1.
    """
    theirs, hidden, ffn = f"model.layers.{layer - 1}.", model.hidden_size, model.ffn_hidden_size
    attention, heads = f"{prefix}self_attention.", model.num_attention_heads * model.head_dim
    found = [_whole(f"{prefix}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,))]
    if model.qk_norm:
        for ours, name in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            found.append(_whole(f"{attention}{ours}.weight", f"{theirs}self_attn.{name}.weight", (model.head_dim,)))
    for kind, rest in (("weight", (hidden,)), ("bias", ())) if model.qkv_bias else (("weight", (hidden,)),):
        found.append(_qkv(model, f"{attention}linear_qkv.{kind}", f"{theirs}self_attn.{{}}_proj.{kind}", rest))
    gate_and_up = [f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up")]
    return [
        *found,
        _whole(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", (hidden, heads)),
        _whole(f"{prefix}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)),
        _joined(
            f"{prefix}mlp.linear_fc1.weight",
            dict.fromkeys(gate_and_up, (ffn, hidden)),
            [(name, 0, ffn) for name in gate_and_up],
        ),
        _whole(f"{prefix}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn)),
    ]


def own_recipe(name: str, shape: Shape) -> Recipe:
    """Of a parameter that is stored as it is, under our name."""
    return _whole(name, name, shape)


def _whole(ours: str, theirs: str, shape: Shape) -> Recipe:
    return _joined(ours, {theirs: shape}, [(theirs, 0, shape[0])])


def _qkv(model: ModelConfig, ours: str, theirs: str, rest: Shape) -> Recipe:
    groups, width = model.num_key_value_heads, model.head_dim
    per_group = {"q": model.num_attention_heads // groups * width, "k": width, "v": width}
    names = {kind: theirs.format(kind) for kind in per_group}
    rows = [
        (names[kind], group * height, (group + 1) * height)
        for group in range(groups)
        for kind, height in per_group.items()
    ]
    return _joined(ours, {names[kind]: (groups * height, *rest) for kind, height in per_group.items()}, rows)


def _joined(ours: str, tensors: Mapping[str, Shape], rows: Sequence[tuple[str, int, int]]) -> Recipe:
    pieces, at = [], 0
    for tensor, start, stop in rows:
        pieces.append(Piece(tensor, start, stop, at))
        at += stop - start
    rest = next(iter(tensors.values()))[1:]
    return Recipe(ours, (at, *rest), tensors, tuple(pieces))
