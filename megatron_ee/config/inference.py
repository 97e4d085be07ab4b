"""The sections `inference` and `serving`: how text is generated when a request does not say otherwise."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from megatron_ee.config.checks import InvalidFieldsError
from megatron_ee.config.fields import (
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    list_as_tuple,
)

Text = Annotated[str, Field(min_length=1)]
StopStrings = Annotated[tuple[Text, ...], BeforeValidator(list_as_tuple)]
TokenIds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(list_as_tuple)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
KvPolicy = Literal["recompute", "fill", "propagate"]


class SamplingParams(Section):
    """How one request's tokens are chosen and where its text ends; the same object in Python, in YAML and over HTTP."""

    max_new_tokens: PositiveInt = 128
    min_new_tokens: NonNegativeInt = Field(0, description="no stop token is chosen before, and no stop string ends it")
    temperature: NonNegativeFloat = Field(0.0, description="0: greedy")
    top_k: NonNegativeInt = Field(0, description="sample among the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample among the likeliest tokens that together have this probability"
    )
    min_p: Probability = Field(0.0, description="drop tokens below this share of the likeliest one's probability")
    repetition_penalty: PositiveFloat = Field(
        1.0, description="divides the positive logits of tokens of prompt and answer, and multiplies negative ones"
    )
    frequency_penalty: Penalty = Field(0.0, description="taken from a token's logit for each time it is in the answer")
    presence_penalty: Penalty = Field(0.0, description="taken once from the logit of each token of the answer")
    logit_bias: dict[NonNegativeInt, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        {}, description="token id -> what is added to its logit"
    )
    seed: NonNegativeInt | None = Field(None, description="of the request's random numbers; null: from the run's seed")
    stop: StopStrings = Field((), description="strings that end the text; they are not part of it")
    stop_token_ids: TokenIds = Field((), description="tokens that end the text, beside the model's own")
    ignore_eos: bool = Field(False, description="the model's own stop tokens don't end the text")
    logprobs: NonNegativeInt | None = Field(
        None, description="log-probability of each token, and of the k likeliest, by the exit that spoke"
    )
    exit_logprobs: bool = Field(False, description="the same of every exit that a token passed")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            message = f"{self.min_new_tokens} must be at most max_new_tokens = {self.max_new_tokens}"
            raise InvalidFieldsError([("min_new_tokens", message)])
        return self


class ExitParams(Section):
    """How one request may exit; the same object in Python, in YAML and over HTTP."""

    mode: Literal["full", "early_exit"] = "early_exit"
    measure: str = Field(
        "max_probability",
        description="confidence of an exit: max_probability, margin, entropy, cosine, gate (its own, see exits.gate), "
        "or a plug-in's",
    )
    threshold: Probability = Field(
        0.9, description="an exit fires at this confidence; 1.0 never, 0.0 at the first exit"
    )
    thresholds: dict[PositiveInt, Probability] = Field({}, description="per exit layer, instead of `threshold`")
    min_exit: NonNegativeInt = Field(0, description="exits below this layer never fire")
    exits: Layers | None = Field(None, description="the exits that may fire; default: all of the model's")
    patience: PositiveInt = Field(
        1, description="an exit fires only if so many that may fire, in a row and itself last, choose its token"
    )
    kv_policy: KvPolicy = Field(
        "recompute",
        description="missing keys and values: recompute and fill are exact; propagate is not, and saves arithmetic",
    )
    max_pending: PositiveInt = Field(256, description="positions with missing KV before a catch-up pass")

    def may_fire(self, exits: Iterable[int]) -> dict[int, float]:
        """Those of a model's exits that may fire, ascending, and the confidence that each needs."""
        if self.mode == "full":
            return {}
        needed = {layer: self.thresholds.get(layer, self.threshold) for layer in sorted(exits)}
        may_fire = {layer: threshold for layer, threshold in needed.items() if self._allows(layer) and threshold < 1}
        return may_fire if len(may_fire) >= self.patience else {}  # there are not so many in a row

    def _allows(self, layer: int) -> bool:
        return layer >= self.min_exit and (self.exits is None or layer in self.exits)


class InferenceConfig(Section):
    """How text is generated when a request does not say otherwise."""

    sampling: SamplingParams = SamplingParams()
    exit: ExitParams = ExitParams()
    max_batch_size: PositiveInt = Field(16, description="sequences decoded together")
    prefill_chunk: PositiveInt = Field(512, description="positions of a prompt that run through the model at once")
    pack_weights: bool = Field(
        True, description="on a CPU in fp32, a second copy of the matrices, laid out for several rows: twice the memory"
    )


class ServingConfig(Section):
    """The server's settings; it has none yet."""
