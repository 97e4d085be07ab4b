"""The section `serving`: what a server offers, to whom, and what it refuses."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ee.config.fields import (
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    list_as_tuple,
)
from megatron_ee.config.inference import KvPolicy, Text

Mode = Literal["full", "early_exit", "speculative", "sled", "dola"]
Modes = Annotated[tuple[Mode, ...], BeforeValidator(list_as_tuple)]
KvPolicies = Annotated[tuple[KvPolicy, ...], BeforeValidator(list_as_tuple)]


class BoundsConfig(Section):
    """What a request may ask for at most. Full depth is always allowed."""

    modes: Modes | None = Field(None, description="of early_exit.mode, beside full; null: all")
    kv_policies: KvPolicies | None = Field(None, description="null: all")
    measures: Names | None = Field(None, description="of early_exit.measure; null: all, which goes with threshold 0")
    threshold: Probability = Field(0.0, description="lowest threshold of any exit that a request may ask for")
    min_exit: NonNegativeInt = Field(0, description="lowest early_exit.min_exit that a request may ask for")
    max_pending: PositiveInt = Field(
        16, description="lowest early_exit.max_pending: whenever so many positions wait, a launch runs for them alone"
    )
    draft_length: PositiveInt = Field(16, description="most tokens drafted at a time, where a request says how many")
    sled_steps: PositiveInt = Field(8, description="most early_exit.sled.steps")
    sled_top_k: PositiveInt = Field(64, description="most early_exit.sled.top_k")
    prompt_tokens: PositiveInt | None = Field(None, description="longest prompt; null: what the model has room for")
    new_tokens: PositiveInt = Field(1024, description="longest answer; one that names no length gets at most this")
    choices: PositiveInt = Field(16, description="answers to one request: prompts times n")
    logprobs: NonNegativeInt = Field(20, description="likeliest tokens whose log-probabilities are given")
    stops: PositiveInt = Field(16, description="stop strings of a request, and its stop tokens")
    stop_characters: PositiveInt = Field(256, description="of the longest stop string")
    biases: NonNegativeInt = Field(1024, description="entries of a logit_bias")
    body_bytes: PositiveInt = Field(2**21, description="of a request")


class AlarmsConfig(Section):
    """When somebody should look. A share is that of the latest requests of one client, beside all others'."""

    window: PositiveInt = Field(32, description="requests of a client that are looked at together")
    exit_rate: Probability = Field(0.5, description="alarm below this part of the others' share of early tokens")
    acceptance: Probability = Field(0.5, description="alarm below this part of the others' share of accepted drafts")
    agreement: Probability = Field(0.9, description="alarm below this share of shadowed tokens that full depth chooses")


class ServingConfig(Section):
    """How `python -m megatron_ee.server` serves a model."""

    model: Text | None = Field(None, description="a run folder, a step folder or a Hugging Face folder; --model is too")
    name: Text | None = Field(None, description="what clients call the model; null: the run's name")
    host: Text = Field("127.0.0.1", description="the address to listen at; this one is heard on this machine alone")
    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8000, description="0: any free one, which is printed")
    keys: Text | None = Field(None, description="a file of API keys; null: whoever connects is served")
    chat_template: Text | None = Field(
        None, description="a Jinja file; null: as the model learned it, or the tokenizer's"
    )
    max_waiting: PositiveInt = Field(64, description="requests that may wait for their turn; more are sent away (429)")
    timeout: PositiveFloat = Field(600.0, description="seconds after which an answer that has not ended fails")
    read_timeout: PositiveFloat = Field(30.0, description="seconds for a request to arrive, or a client to read on")
    drain: NonNegativeFloat = Field(30.0, description="seconds for answers to end, once the server is told to")
    audit: Text | None = Field(None, description="a file that notes what was refused, by whom; null: the log alone")
    shadow: Probability = Field(0.0, description="share of answers that full depth judges, too")
    bounds: BoundsConfig = BoundsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
