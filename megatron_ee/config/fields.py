"""What the sections of a config are made of: the strict base of all, and kinds of numbers and lists."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Unknown keys, implicit conversions ("12" for 12, 1 for true) and assignment are all errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[tuple[PositiveInt, ...], BeforeValidator(list_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(list_as_tuple)]
Weights = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(list_as_tuple)]
Split = Annotated[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat], BeforeValidator(list_as_tuple)]
