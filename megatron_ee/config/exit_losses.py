"""How exits are trained: loss weights over time, what the loss on a token is made of, and gates."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ee.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section, list_as_tuple

TokenWeights = Literal["none", "max_probability"]
GateKind = Literal["none", "linear", "mlp"]
GateKinds = Annotated[tuple[GateKind, ...], BeforeValidator(list_as_tuple)]
Temperatures = Annotated[tuple[PositiveFloat, ...], BeforeValidator(list_as_tuple)]


class WeightScheduleConfig(Section):
    """How an exit's loss weight goes from `start` to its target in `warmup_iters` iterations."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    start: NonNegativeFloat = 0.0
    warmup_iters: NonNegativeInt = 1000


WeightSchedules = Annotated[tuple[WeightScheduleConfig, ...], BeforeValidator(list_as_tuple)]


class DistillationConfig(Section):
    """An exit learns from the final exit's distribution, where both are in one part of the model."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of an exit's loss that is against the final exit; the rest is cross-entropy"
    )
    temperature: PositiveFloat = Field(1.0, description="of both distributions, beside the exit's own temperature")


class GateLossConfig(Section):
    """What gates are trained on: whether the exit is right, as binary cross-entropy."""

    weight: PositiveFloat = Field(0.1, description="of every gate's loss; it moves nothing but the gates")
    false_exit_cost: PositiveFloat = Field(
        2.0, description="what leaving where the exit is wrong costs, if going on where it is right costs 1"
    )
    target: Literal["label", "final"] = Field(
        "label", description="an exit is right where its likeliest token is the label's, or the final exit's"
    )
