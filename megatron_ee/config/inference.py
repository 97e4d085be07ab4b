"""The section `inference`: how text is generated when a request does not say otherwise."""

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


class SledParams(Section):
    """Self Logits Evolution Decoding (arXiv 2411.02433): what the exits' logits grew into corrects the final ones."""

    layers: Layers | None = Field(None, description="the exits that are listened to; default: all of the model's")
    alpha: NonNegativeFloat = Field(2.0, description="evolution rate: how far the logits move; 0: not at all")
    top_k: PositiveInt = Field(10, description="evolution scale: so many of the likeliest tokens stay in the race")
    steps: PositiveInt = Field(1, description="evolution steps, each shorter than the one before")
    lower_bound: Annotated[float, Field(allow_inf_nan=False)] = Field(
        -1000.0, description="logit of all tokens beyond the top_k"
    )
    norm: bool = Field(True, description="an exit's own head; false: its layer's output, projected as it is")


class DolaParams(Section):
    """Decoding by Contrasting Layers (arXiv 2309.03883): what the last layers add to the exit that differs most."""

    layers: Layers | None = Field(None, description="the exits to choose from; default: all of the model's")
    relative_top: Probability = Field(
        0.1, description="tokens below this share of the likeliest one's probability are ruled out"
    )
    lower_bound: Annotated[float, Field(allow_inf_nan=False)] = Field(-1000.0, description="logit of those ruled out")
    norm: bool = Field(True, description="an exit's own head; false: its layer's output, projected as it is")


class ExitParams(Section):
    """How one request uses exits; the same object in Python, in YAML and over HTTP."""

    mode: Literal["full", "early_exit", "speculative", "sled", "dola"] = Field(
        "early_exit",
        description="full: no exit; early_exit: a token leaves where it is confident; speculative: an exit drafts what "
        "full depth verifies, with the tokens of full; sled, dola: full depth, corrected by the exits",
    )
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
    draft_exit: PositiveInt | Literal["auto"] = Field(
        "auto", description="the exit that drafts; auto: whichever of those that may fire gains most, as texts go on"
    )
    draft_length: PositiveInt | Literal["auto"] = Field(
        "auto", description="most tokens drafted at a time; auto: as acceptance pays, none where it does not"
    )
    draft_threshold: Probability = Field(
        0.0, description="a draft ends where the exit's likeliest token is less probable"
    )
    sled: SledParams = SledParams()
    dola: DolaParams = DolaParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.draft_length != "auto" and self.draft_length > self.max_pending:
            message = f"{self.draft_length} must be at most max_pending = {self.max_pending}"
            raise InvalidFieldsError([("draft_length", message)])
        return self

    def may_draft(self, exits: Iterable[int]) -> tuple[int, ...]:
        """Those of a model's exits that draft, ascending."""
        if self.mode != "speculative":
            return ()
        if self.draft_exit != "auto":
            return (self.draft_exit,)
        return tuple(layer for layer in sorted(exits) if self._allows(layer))

    def heard(self, exits: Iterable[int]) -> tuple[int, ...]:
        """Those of a model's exits that correct the final logits, ascending."""
        if self.mode not in ("sled", "dola"):
            return ()
        layers = self._correction.layers
        return tuple(sorted(set(exits if layers is None else layers)))

    @property
    def hears_heads(self) -> bool:
        """Whether exits that correct the final logits speak by their heads."""
        return self._correction.norm

    @property
    def _correction(self) -> SledParams | DolaParams:
        return self.sled if self.mode == "sled" else self.dola

    def may_fire(self, exits: Iterable[int]) -> dict[int, float]:
        """Those of a model's exits that may fire, ascending, and the confidence that each needs."""
        if self.mode != "early_exit":
            return {}
        needed = {layer: self.thresholds.get(layer, self.threshold) for layer in sorted(exits)}
        may_fire = {layer: threshold for layer, threshold in needed.items() if self._allows(layer) and threshold < 1}
        return may_fire if len(may_fire) >= self.patience else {}  # there are not so many in a row

    def _allows(self, layer: int) -> bool:
        return layer >= self.min_exit and (self.exits is None or layer in self.exits)


class SchedulingParams(Section):
    """Which rows run together. It changes no token."""

    strategy: Literal["lockstep", "compaction", "rebatch"] = Field(
        "compaction",
        description="lockstep: a batch goes on together until its last row has left; compaction: rows that have left "
        "make it smaller; rebatch: rows that go deeper wait for others, while new tokens begin",
    )
    launch_rows: PositiveInt | None = Field(
        None,
        description="tokens that fill a launch; more sequences than that wait for their turn; null: all of them, or "
        "on a pipeline so many that its stages have as much to do",
    )
    max_wait: PositiveInt = Field(16, description="launches after which a row that waits goes on, whoever goes with it")


class KvCacheConfig(Section):
    """Memory for keys and values, which sequences take in blocks."""

    positions: PositiveInt | None = Field(
        None, description="of all sequences together; null: so many that `max_batch_size` of the longest fit"
    )
    block_size: PositiveInt = Field(16, description="positions of a block")
    admission: Literal["answer", "prompt"] = Field(
        "answer",
        description="what has to fit before a request is taken in. answer: its prompt and its longest answer; prompt: "
        "its prompt; where memory runs out later, the requests that came last make way, and are computed again",
    )
    keep_prefixes: bool = Field(
        False, description="prompts that begin as earlier ones did take over their keys and values, by whole blocks"
    )


class DecodingParallelConfig(Section):
    """How a model is split over the processes that decode with it. It changes no token."""

    pipeline: PositiveInt = Field(
        1,
        description="stages; processes that were started are shared out evenly, and those of a stage share matrices",
    )
    layout: Literal["equal", "survival"] | Layers = Field(
        "equal",
        description="equal: the slowest stage as fast as can be where every token runs all layers; survival: where "
        "tokens leave as in `depths`; or a list, the number of layers of each stage",
    )
    depths: Text | None = Field(
        None, description="for survival: the file that python -m megatron_ee.inference --depths wrote"
    )
    timeout: PositiveFloat = Field(
        300.0, description="seconds after which a stage that does not answer is lost, and with it all requests"
    )


class InferenceConfig(Section):
    """How text is generated when a request does not say otherwise."""

    sampling: SamplingParams = SamplingParams()
    exit: ExitParams = ExitParams()
    thresholds_file: Text | None = Field(
        None,
        description="what tools/calibrate_thresholds.py wrote: its exit settings instead of `exit`, for its checkpoint "
        "alone",
    )
    max_batch_size: PositiveInt = Field(16, description="sequences decoded together")
    scheduling: SchedulingParams = SchedulingParams()
    kv_cache: KvCacheConfig = KvCacheConfig()
    parallel: DecodingParallelConfig = DecodingParallelConfig()
    prefill_chunk: PositiveInt = Field(512, description="positions of a prompt that run through the model at once")
    pack_weights: bool = Field(
        True, description="on a CPU in fp32, a second copy of the matrices, laid out for several rows: twice the memory"
    )
