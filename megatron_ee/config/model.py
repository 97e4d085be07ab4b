"""The sections `model` and `exits`: what is trained."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.fields import (
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Weights,
    list_as_tuple,
)

Precision = Literal["fp32", "bf16", "fp16"]
HeadKind = Literal["norm", "mlp", "block"]
Projection = Literal["shared", "own"]
HeadKinds = Annotated[tuple[HeadKind, ...], BeforeValidator(list_as_tuple)]
Projections = Annotated[tuple[Projection, ...], BeforeValidator(list_as_tuple)]


class ModelConfig(Section):
    """A decoder of the Llama family: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt = Field(
        description="default: num_attention_heads", default_factory=lambda model: model["num_attention_heads"]
    )
    head_dim: PositiveInt = Field(
        description="default: hidden_size / num_attention_heads",
        default_factory=lambda model: max(1, model["hidden_size"] // model["num_attention_heads"]),
    )
    ffn_hidden_size: PositiveInt = Field(
        description="default: 8/3 hidden_size, rounded up to a multiple of 64",
        default_factory=lambda model: -(-8 * model["hidden_size"] // (3 * 64)) * 64,
    )
    vocab_size: PositiveInt | Literal["auto"] = Field("auto", description="auto: the tokenizer's, rounded up to 64")
    tie_embeddings: bool = Field(False, description="the output projection is the input embedding")
    rope_theta: PositiveFloat = 10000.0
    norm_epsilon: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                (
                    "num_key_value_heads",
                    f"{self.num_key_value_heads} must divide num_attention_heads = {self.num_attention_heads}",
                )
            )
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            problems.append(
                ("hidden_size", f"{self.hidden_size} doesn't divide over {heads} heads, nor is head_dim set")
            )
        if self.head_dim % 2:
            problems.append(("head_dim", f"{self.head_dim} must be even: rotary positions turn pairs of channels"))
        if problems:
            raise InvalidFieldsError(problems)
        return self


class WeightScheduleConfig(Section):
    """How an exit's loss weight goes from `start` to its target in `warmup_iters` iterations."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    start: NonNegativeFloat = 0.0
    warmup_iters: NonNegativeInt = 1000


class ExitsConfig(Section):
    """Early exits: where they are, what their loss weighs, and what their heads own."""

    layers: Layers = Field((), description="ascending; each is the number of layers run before the exit")
    weights: Weights = Field((), description="target loss weight of each exit; default: layer / num_layers")
    weight_schedule: WeightScheduleConfig = WeightScheduleConfig()
    head: HeadKind | HeadKinds = Field(
        "norm",
        description="what an exit has before its projection: a norm; an MLP, or a whole transformer layer, and a norm; "
        "one for all exits, or a list",
    )
    projection: Projection | Projections = Field(
        "shared", description="shared: the final output's weight; own: the exit's; one for all exits, or a list"
    )
    initialize: Literal["copy", "random"] = Field(
        "copy",
        description="what exits that checkpoint.initial lacks begin as; copy: the final norm and output weight, an MLP "
        "head as its layer's MLP, a block head as the model's last layer",
    )
    release: bool = Field(
        False, description="run an exit's loss just before its backward: less memory, and less of it is hidden"
    )
    loss_chunk_rows: NonNegativeInt = Field(
        512, description="tokens whose logits exist at a time in training; 0: all of a micro-batch's"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidFieldsError([("layers", f"{list(self.layers)} must ascend, without duplicates")])
        listed = {
            name: len(value)
            for name, value in (("weights", self.weights or None), ("head", self.head), ("projection", self.projection))
            if isinstance(value, tuple)
        }
        problems = [
            (name, f"{count} {name.removesuffix('s')}{'s' * (count != 1)}, but exits.layers has {len(self.layers)}")
            for name, count in listed.items()
            if count != len(self.layers)
        ]
        if problems:
            raise InvalidFieldsError(problems)
        return self

    def head_of(self, layer: int) -> HeadKind:
        """The head of the exit after `layer`; one that isn't listed is the final output, which is a norm."""
        if layer not in self.layers:
            return "norm"
        return self.head if isinstance(self.head, str) else self.head[self.layers.index(layer)]

    def projection_of(self, layer: int) -> Projection:
        """Whether the exit after `layer` has a projection of its own. The final output's is the shared one."""
        if layer not in self.layers:
            return "shared"
        return self.projection if isinstance(self.projection, str) else self.projection[self.layers.index(layer)]
