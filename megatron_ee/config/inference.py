"""The sections `inference` and `serving`: how text is generated when a request does not say otherwise."""

from typing import Literal

from pydantic import Field

from megatron_ee.config.fields import Layers, NonNegativeFloat, NonNegativeInt, PositiveInt, Probability, Section


class ExitParams(Section):
    """How one request may exit; the same object in Python, in YAML and over HTTP."""

    mode: Literal["full", "early_exit"] = "early_exit"
    measure: str = Field(
        "max_probability",
        description="confidence of an exit: max_probability, gate (its own, see exits.gate), or a plug-in's",
    )
    threshold: Probability = Field(
        0.9, description="an exit fires at this confidence; 1.0 never, 0.0 at the first exit"
    )
    thresholds: dict[PositiveInt, Probability] = Field({}, description="per exit layer, instead of `threshold`")
    min_exit: NonNegativeInt = Field(0, description="exits below this layer never fire")
    exits: Layers | None = Field(None, description="the exits that may fire; default: all of the model's")
    kv_policy: Literal["recompute"] = "recompute"
    max_pending: PositiveInt = Field(256, description="positions with missing KV before a catch-up pass")


class InferenceConfig(Section):
    """How text is generated when a request does not say otherwise."""

    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = Field(0.0, description="0: greedy")
    top_k: NonNegativeInt = Field(0, description="sample among the k likeliest tokens; 0: all")
    exit: ExitParams = ExitParams()


class ServingConfig(Section):
    """The server's settings; it has none yet."""
