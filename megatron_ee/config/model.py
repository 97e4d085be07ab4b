"""The sections `model` and `exits`: what is trained."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.checks_exits import exits_problems
from megatron_ee.config.checks_model import model_problems
from megatron_ee.config.exit_losses import (
    DistillationConfig,
    GateKind,
    GateKinds,
    GateLossConfig,
    Temperatures,
    TokenWeights,
    WeightScheduleConfig,
    WeightSchedules,
)
from megatron_ee.config.fields import (
    Layers,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Weights,
    list_as_tuple,
)
from megatron_ee.config.layerskip import LayerSkipConfig
from megatron_ee.config.positions import RopeScaling

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
    rope_scaling: RopeScaling | None = Field(None, description="kind: linear, llama3 or yarn, and its settings")
    max_position_embeddings: PositiveInt | None = Field(
        None, description="the longest sequence that the model is made for; null: data.sequence_length"
    )
    qkv_bias: bool = Field(False, description="queries, keys and values have a bias, as Qwen2's")
    qk_norm: bool = Field(False, description="each head's queries and keys are normalised (RMSNorm), as Qwen3's")
    sliding_window: PositiveInt | None = Field(
        None, description="positions that a query sees, its own among them; null: all up to its own"
    )
    sliding_window_layers: Layers | Literal["all"] = Field(
        "all", description="layers whose attention the window holds for, ascending; the others see all"
    )
    norm_epsilon: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(model_problems(self)):
            raise InvalidFieldsError(problems)
        return self

    def window_of(self, layer: int) -> int | None:
        """Positions that a query of this layer sees at most, its own among them; None: all up to its own."""
        windowed = self.sliding_window_layers == "all" or layer in self.sliding_window_layers
        return self.sliding_window if windowed else None


_LISTS = {
    "weights": "weight",
    "weight_schedule": "schedule",
    "head": "head",
    "projection": "projection",
    "temperature": "temperature",
    "gate": "gate",
}
"""Fields with a value for each exit, where they are lists, and what one value is called."""


class ExitsConfig(Section):
    """Early exits: where they are, what their loss weighs, and what their heads own."""

    layers: Layers = Field(
        (), description="ascending; each is the number of layers run before the exit; all: every layer below the last"
    )
    weights: Weights = Field((), description="target loss weight of each exit; default: layer / num_layers")
    weight_schedule: WeightScheduleConfig | WeightSchedules = Field(
        WeightScheduleConfig(), description="how weights get to their targets; one for all exits, or a list"
    )
    head: HeadKind | HeadKinds = Field(
        "norm",
        description="what an exit has before its projection: a norm; an MLP, or a whole transformer layer, and a norm; "
        "one for all exits, or a list",
    )
    projection: Projection | Projections = Field(
        "shared", description="shared: the final output's weight; own: the exit's; one for all exits, or a list"
    )
    norm: Literal["own", "shared"] = Field(
        "own", description="own: each exit's; shared: the final output's norm, for exits that are no more than a norm"
    )
    layerskip: LayerSkipConfig | None = Field(
        None, description="loss weights by LayerSkip's recipe, instead of `weights` and `weight_schedule`"
    )
    temperature: PositiveFloat | Temperatures = Field(
        1.0,
        description="an exit's logits are divided by it, in training and in decoding; one for all exits, or a list. "
        "The final output's is 1",
    )
    token_weights: TokenWeights = Field(
        "none",
        description="max_probability: an exit's loss on a token times its own highest probability there, without "
        "gradient",
    )
    distillation: DistillationConfig | None = None
    gate: GateKind | GateKinds = Field(
        "none",
        description="a head that learns whether its exit is right, for inference.exit.measure: gate; one for all "
        "exits, or a list",
    )
    gate_loss: GateLossConfig = GateLossConfig()
    initialize: Literal["copy", "random"] = Field(
        "copy",
        description="what exits that checkpoint.initial lacks begin as; copy: the final norm and output weight, an MLP "
        "head as its layer's MLP, a block head as the model's last layer",
    )
    release: bool = Field(
        False, description="run an exit's loss just before its backward: less memory, and less of it is hidden"
    )
    loss_chunk_rows: NonNegativeInt = Field(
        512,
        description="tokens whose logits exist at a time in training; 0: all of a micro-batch's. On a GPU few at a "
        "time take little memory and long: 512 three times as long as all, 2048 a third longer",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidFieldsError([("layers", f"{list(self.layers)} must ascend, without duplicates")])
        listed = {
            name: len(value)
            for name in _LISTS
            if isinstance(value := getattr(self, name), tuple) and (value or name != "weights")
        }
        problems = [
            (name, f"{count} {_LISTS[name]}{'s' * (count != 1)}, but exits.layers has {len(self.layers)}")
            for name, count in listed.items()
            if count != len(self.layers)
        ]
        problems += exits_problems(self)
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

    def weight_schedule_of(self, layer: int) -> WeightScheduleConfig:
        """How the loss weight of the early exit after `layer` changes over time."""
        schedule = self.weight_schedule
        return schedule[self.layers.index(layer)] if isinstance(schedule, tuple) else schedule

    def temperature_of(self, layer: int) -> float:
        """What the logits of the exit after `layer` are divided by; the final output's by 1."""
        if layer not in self.layers:
            return 1.0
        return self.temperature[self.layers.index(layer)] if isinstance(self.temperature, tuple) else self.temperature

    def gate_of(self, layer: int) -> GateKind:
        """The gate of the exit after `layer`; the final output has none."""
        if layer not in self.layers:
            return "none"
        return self.gate if isinstance(self.gate, str) else self.gate[self.layers.index(layer)]

    @property
    def gated(self) -> list[int]:
        """The exits with a gate, ascending."""
        return [layer for layer in self.layers if self.gate_of(layer) != "none"]
