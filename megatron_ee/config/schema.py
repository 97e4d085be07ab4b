"""The typed tree behind every YAML file: frozen, strict, and complete (defaults are filled in, nothing mutates it).

Layers are counted from 1, and "exit layer E" always means the number of layers run. The final output is the
exit after the last layer: it has loss weight 1 and is never listed.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from megatron_ee.config.checks import InvalidFieldsError, problems_of


class Section(BaseModel):
    """Unknown keys, implicit conversions ("12" for 12, 1 for true) and assignment are all errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Layers = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_list_as_tuple)]
Weights = Annotated[tuple[NonNegativeFloat, ...], BeforeValidator(_list_as_tuple)]
Split = Annotated[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat], BeforeValidator(_list_as_tuple)]


Precision = Literal["fp32", "bf16", "fp16"]
HeadKind = Literal["norm", "mlp", "block"]
Projection = Literal["shared", "own"]
HeadKinds = Annotated[tuple[HeadKind, ...], BeforeValidator(_list_as_tuple)]
Projections = Annotated[tuple[Projection, ...], BeforeValidator(_list_as_tuple)]
RecomputeModules = Annotated[
    tuple[Literal["core_attn", "mlp", "layernorm"], ...], Field(min_length=1), BeforeValidator(_list_as_tuple)
]


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
    norm_epsilon: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                (
                    "num_key_value_heads",
                    f"{self.num_key_value_heads} must divide num_attention_heads = {self.num_attention_heads}",
                )
            )
        if "head_dim" not in self.model_fields_set and self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            problems.append(
                ("hidden_size", f"{self.hidden_size} doesn't divide over {heads} heads, nor is head_dim set")
            )
        if self.head_dim % 2:
            problems.append(("head_dim", f"{self.head_dim} must be even: rotary positions turn pairs of channels"))
        if problems:
            raise InvalidFieldsError(problems)
        return self


class WeightScheduleConfig(Section):
    """How an exit's loss weight goes from `start` to its target in `warmup_iters` iterations."""

    shape: Literal["linear", "cosine", "constant"] = "linear"
    start: NonNegativeFloat = 0.0
    warmup_iters: NonNegativeInt = 1000


class ExitsConfig(Section):
    """Early exits: where they are, what their loss weighs, and what their heads own."""

    layers: Layers = Field((), description="ascending; each is the number of layers run before the exit")
    weights: Weights = Field((), description="target loss weight of each exit; default: layer / num_layers")
    weight_schedule: WeightScheduleConfig = WeightScheduleConfig()
    head: HeadKind | HeadKinds = Field(
        "norm",
        description="what an exit has before its projection: a norm; an MLP, or a whole transformer layer, and a norm; "
        "one for all exits, or a list",
    )
    projection: Projection | Projections = Field(
        "shared", description="shared: the final output's weight; own: the exit's; one for all exits, or a list"
    )
    release: bool = Field(
        False, description="run an exit's loss just before its backward: less memory, and less of it is hidden"
    )
    loss_chunk_rows: NonNegativeInt = Field(
        512, description="tokens whose logits exist at a time in training; 0: all of a micro-batch's"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidFieldsError([("layers", f"{list(self.layers)} must ascend, without duplicates")])
        listed = {
            name: len(value)
            for name, value in (("weights", self.weights or None), ("head", self.head), ("projection", self.projection))
            if isinstance(value, tuple)
        }
        problems = [
            (name, f"{count} {name.removesuffix('s')}{'s' * (count != 1)}, but exits.layers has {len(self.layers)}")
            for name, count in listed.items()
            if count != len(self.layers)
        ]
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


class StagePlacement(Section):
    """One stage, or one chunk of it, of a hand-pinned layout. An exit on a border belongs to one of the two sides."""

    layers: PositiveInt
    exits_at_start: bool = Field(False, description="own the exit on the left border")
    exits_at_end: bool = Field(True, description="own the exit on the right border")


class ParallelConfig(Section):
    """How the model is split over processes and in which order a step's micro-batches run."""

    tensor: PositiveInt = Field(1, description="ranks that share each matrix")
    sequence: bool = Field(False, description="between matrices, tensor-parallel ranks share the positions too")
    pipeline: PositiveInt = Field(1, description="stages")
    chunks: PositiveInt = Field(1, description="pieces of the model on each stage; above 1 for schedule interleaved")
    data: PositiveInt | Literal["auto"] = Field("auto", description="auto: world size / (tensor x pipeline)")
    schedule: str = Field(
        "1f1b",
        description="1f1b, gpipe, interleaved, filled-1f1b (extra micro-batches in idle time), zero-bubble (1f1b whose "
        "gradients of weights come later), megatron (megatron-core's own 1f1b or interleaved), or a plug-in's",
    )
    layout: Literal["auto"] | Annotated[tuple[StagePlacement, ...], BeforeValidator(_list_as_tuple)] = Field(
        "auto",
        description="auto: the slowest stage as fast as can be; or a list, one entry a stage, those of every stage's "
        "first chunk before those of the second",
    )
    costs: str = Field(
        "estimated",
        description="durations of layers and exits, for layouts and fills: estimated from their products, or the file "
        "that tools/measure_costs.py wrote",
    )
    fill_tolerance: NonNegativeFloat = Field(
        0.0, description="filled-1f1b: the share of its length by which fills may lengthen a step"
    )
    overlap_grad_reduce: bool = Field(False, description="sum gradients over data ranks while others are computed")
    distributed_optimizer: bool = Field(False, description="data ranks share the optimizer's state (ZeRO stage 1)")

    @property
    def goes_in_rounds(self) -> bool:
        """Whether micro-batches go through the stages' chunks in groups of as many as there are stages."""
        return self.schedule == "interleaved" or (self.schedule == "megatron" and self.chunks > 1)


class BlendEntry(Section):
    """One dataset of a blend; weights are relative to each other."""

    path: str = Field(description="path prefix of a .bin/.idx pair")
    weight: PositiveFloat


class DataConfig(Section):
    """Token sequences for training, validation and test."""

    dataset: str | Annotated[tuple[BlendEntry, ...], Field(min_length=1), BeforeValidator(_list_as_tuple)] = Field(
        "python-stdlib",
        description="python-stdlib (built in), the path prefix of a .bin/.idx pair, or a weighted list of such",
    )
    tokenizer: str = Field("bytes", description="bytes, a tokenizer.json, or the folder of a Hugging Face tokenizer")
    sequence_length: PositiveInt = 1024
    split: Split = Field((90.0, 5.0, 5.0), description="shares of the documents for training, validation and test")
    folder: str = Field("runs/data", description="where the built-in dataset and index caches are kept")


class TrainingConfig(Section):
    """How long a run trains, on batches of which size, and how often it is validated."""

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
    eval_interval: NonNegativeInt = Field(0, description="iterations between validations; 0: only at the end")
    eval_iters: NonNegativeInt = Field(10, description="global batches per validation; 0: no validation")


class OptimizerConfig(Section):
    """AdamW with a linear warm-up of the learning rate, then a decay to `min_lr`."""

    backend: str = Field("megatron", description="megatron (megatron-core's AdamW), or a plug-in's")
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


class CheckpointConfig(Section):
    """When checkpoints are written, and whether a run continues from one."""

    interval: NonNegativeInt = Field(0, description="iterations between checkpoints; 0: only at the end")
    resume: bool = Field(True, description="continue from the run's newest checkpoint when there is one")


class WandbConfig(Section):
    """A run on Weights & Biases. Where and as whom is in its own environment and login, never here."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="default: its own WANDB_MODE")
    tags: Names = ()


class LoggingConfig(Section):
    """Where a run reports, beside the console and metrics.jsonl, and how often."""

    interval: PositiveInt = Field(10, description="iterations between console lines and metrics.jsonl records")
    trace_iterations: Layers = Field(
        (), description="iterations, counted from 1, whose actions are timed and written to traces/; these are slower"
    )
    tensorboard: bool = Field(False, description="write event files into the run's folder")
    wandb: WandbConfig | None = None


class ExitParams(Section):
    """How one request may exit; the same object in Python, in YAML and over HTTP."""

    mode: Literal["full", "early_exit"] = "early_exit"
    measure: str = Field("max_probability", description="confidence of an exit: max_probability, or a plug-in's")
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


class Config(Section):
    """Everything that describes a run. One YAML file holds it; the resolved tree is saved beside the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runs: str = Field("runs", description="the folder that holds run folders")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when every local rank has a GPU")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy takes
    plugins: Names = Field((), description="Python files with policies, schedules and optimizers of one's own")
    model: ModelConfig
    exits: ExitsConfig = ExitsConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    inference: InferenceConfig = InferenceConfig()
    serving: ServingConfig = ServingConfig()

    @field_validator("exits")
    @classmethod
    def _fill_exit_weights(cls, exits: ExitsConfig, info: ValidationInfo) -> ExitsConfig:
        """Default weights grow with depth: 0.25 at a quarter of the layers, 0.5 at half of them."""
        model = info.data.get("model")  # absent when it is itself invalid
        if model is None or exits.weights:
            return exits
        return exits.model_copy(update={"weights": tuple(layer / model.num_layers for layer in exits.layers)})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(problems_of(self)):
            raise InvalidFieldsError(problems)
        return self
