"""What LayerSkip's recipe (Elhoushi et al., arXiv 2404.16710) adds to `exits` and `training`."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ee.config.fields import PositiveInt, Probability, Section

_ROTATION = 8


class LayerSkipConfig(Section):
    """The loss weights of all exits, the final one's too: they grow with depth, are normalised to a sum of 1, and a
    curriculum says which exits have one in an iteration."""

    scale: Probability = Field(0.2, description="the paper's e_scale: what early exits weigh beside the final one")
    curriculum: Literal["none", "rotational", "gradual"] = Field(
        "rotational",
        description="which early exits have a loss in an iteration: all; every `rotation`-th, shifted by one in each "
        "iteration; or from the last downward, all of them from the middle of the run",
    )
    rotation: PositiveInt | None = Field(
        description=f"rotational: the distance of layers with a loss, the paper's R; default: {_ROTATION}",
        default_factory=lambda settings: _ROTATION if settings.get("curriculum") == "rotational" else None,
    )


class LayerDropoutConfig(Section):
    """Samples skip layers in training, more of them the deeper the layer; the last layer at `maximum`."""

    maximum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="the probability with which a sample skips the last layer"
    )
    shape: Literal["exponential", "linear", "sqrt", "uniform"] = Field(
        "exponential", description="how it grows from the first layer, which nothing skips (uniform: all layers alike)"
    )
    curriculum: Literal["none", "exponential"] = Field(
        "none", description="exponential: from 0 in the first iteration to `maximum` in the last"
    )
