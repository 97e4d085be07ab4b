"""The sections `data`, `training` and `optimizer`: on what a model is trained, for how long, and by which updates."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ee.config.fields import (
    Names,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Split,
    list_as_tuple,
)
from megatron_ee.config.layerskip import LayerDropoutConfig
from megatron_ee.config.model import Precision

RecomputeModules = Annotated[
    tuple[Literal["core_attn", "mlp", "layernorm"], ...], Field(min_length=1), BeforeValidator(list_as_tuple)
]


class BlendEntry(Section):
    """One dataset of a blend; weights are relative to each other."""

    path: str = Field(description="path prefix of a .bin/.idx pair")
    weight: PositiveFloat


class DataConfig(Section):
    """Token sequences for training, validation and test."""

    format: Literal["documents", "messages"] = Field(
        "documents", description="documents: text, indexed; messages: conversations in a .jsonl, of which answers count"
    )
    dataset: str | Annotated[tuple[BlendEntry, ...], Field(min_length=1), BeforeValidator(list_as_tuple)] = Field(
        "python-stdlib",
        description="python-stdlib (built in), the path prefix of a .bin/.idx pair, or a weighted list of such; for "
        'messages a .jsonl (or .jsonl.gz) with {"messages": [{"role": ..., "content": ...}, ...]} a line',
    )
    validation: str | None = Field(
        None, description="messages: a .jsonl of conversations for validation; default: split's share of the dataset"
    )
    chat_template: str = Field(
        "default", description="messages: default (the tokenizer's own), or a Jinja file, which checkpoints keep"
    )
    packing: bool = Field(
        True, description="messages: several conversations a sequence, unseen by each other; false: one each, padded"
    )
    tokenizer: str = Field("bytes", description="bytes, a tokenizer.json, or the folder of a Hugging Face tokenizer")
    sequence_length: PositiveInt = 1024
    split: Split = Field(
        (90.0, 5.0, 5.0),
        description="shares of the documents or conversations for training, validation and test; all are for training "
        "where there is a file for validation",
    )
    folder: str = Field("runs/data", description="where the built-in dataset and index caches are kept")


class TrainingConfig(Section):
    """How long a run trains, on batches of which size, and how often it is validated."""

    trains: Literal["all", "exits"] = Field(
        "all",
        description="exits: the rest of checkpoint.initial's model stays as it is and only runs forward, up to the "
        "last exit (EE-Tuning)",
    )
    train_iters: PositiveInt
    global_batch_size: PositiveInt = Field(description="sequences per optimizer step")
    micro_batch_size: PositiveInt
    precision: Precision = Field(
        "fp32", description="of parameters and activations; gradients, moments and master weights are fp32"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward computes again instead of keeping it: `recompute_modules`, or all layers"
    )
    recompute_modules: RecomputeModules = Field(("core_attn",), description="of each layer, for selective")
    layer_dropout: LayerDropoutConfig | None = Field(None, description="of whole layers, for each sample by itself")
    eval_interval: NonNegativeInt = Field(0, description="iterations between validations; 0: only at the end")
    eval_iters: NonNegativeInt = Field(10, description="global batches per validation; 0: no validation")
    exit_duration: PositiveFloat | None = Field(
        None, description="minutes after which a start of the run saves and stops, to be started again; default: never"
    )


class DeepSpeedConfig(Section):
    """What DeepSpeed does of a step: it sums gradients over data ranks, which share the optimizer's state."""

    stage: PositiveInt = Field(1, description="of ZeRO; only stage 1 goes with pipelines that run their own backward")
    offload: Literal["none", "cpu"] = Field(
        "none", description="cpu: the optimizer's state is kept in the host's memory, and updated there"
    )


class OptimizerConfig(Section):
    """AdamW with a linear warm-up of the learning rate, then a decay to `min_lr`."""

    backend: str = Field(
        "megatron",
        description="whose AdamW: megatron (megatron-core's), torch, deepspeed (ZeRO stage 1), apex or "
        "transformer_engine (fused, on GPUs), or a plug-in's",
    )
    deepspeed: DeepSpeedConfig = Field(DeepSpeedConfig(), description="of backend deepspeed")
    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 0.0
    lr_warmup_iters: NonNegativeInt = 0
    lr_decay: str = Field("cosine", description="cosine, linear, wsd, constant, or a plug-in's")
    lr_cooldown_iters: NonNegativeInt = Field(0, description="wsd: iterations of the decay at the end")
    weight_decay: NonNegativeFloat = 0.1
    no_weight_decay: Names = Field(
        (), description="patterns of parameters without decay, beside all norms: embedding.*"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    clip_grad_norm: NonNegativeFloat = Field(1.0, description="0: no clipping")
    initial_loss_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        65536.0, description="fp16: halved when gradients overflow again and again, doubled after 1000 steps without"
    )
