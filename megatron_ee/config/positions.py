"""How far the rotary positions of a model reach: `model.rope_scaling`, in the terms of Hugging Face's configs."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.fields import PositiveFloat, PositiveInt, Section

Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class LinearScaling(Section):
    """Position interpolation (Chen et al., arXiv 2306.15595): all angles are divided by the factor."""

    kind: Literal["linear"]
    factor: Factor


class Llama3Scaling(Section):
    """Llama 3.1's: the angles of channels that turn slowly are divided by the factor, those of fast ones are not."""

    kind: Literal["llama3"]
    factor: Factor
    low_freq_factor: PositiveFloat = Field(1.0, description="channels with fewer turns than this are slow")
    high_freq_factor: PositiveFloat = Field(4.0, description="channels with more turns than this are fast")
    original_max_position_embeddings: PositiveInt = Field(
        8192, description="the positions that the model was first trained for, in which turns are counted"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise InvalidFieldsError([("low_freq_factor", f"{low} must be below high_freq_factor = {high}")])
        return self


class YarnScaling(Section):
    """YaRN (Peng et al., arXiv 2309.00071): as `llama3`, along a ramp over channels, and attention is scaled."""

    kind: Literal["yarn"]
    factor: Factor
    original_max_position_embeddings: PositiveInt = Field(
        description="the positions that the model was first trained for, in which turns are counted"
    )
    beta_fast: PositiveFloat = Field(32.0, description="channels with more turns than this are fast")
    beta_slow: PositiveFloat = Field(1.0, description="channels with fewer turns than this are slow")
    attention_factor: PositiveFloat | None = Field(
        None, description="what queries and keys are multiplied by; null: 0.1 ln(factor) + 1"
    )
    truncate: bool = Field(True, description="the ramp's ends are whole channels")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_slow >= self.beta_fast:
            raise InvalidFieldsError([("beta_slow", f"{self.beta_slow} must be below beta_fast = {self.beta_fast}")])
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]
