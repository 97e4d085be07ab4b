"""What a config costs on each rank, before anything is started: parameters, memory, checkpoint, and the placement."""

from dataclasses import dataclass

from megatron_ee.config import Config, ModelConfig
from megatron_ee.parallel.layout import StageLayout, place
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.world import count_microbatches, data_parallel_size

BYTES = 4  # parameters, gradients, moments and activations are fp32
MOMENTS = 2  # AdamW's


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage, in numbers of parameters and in bytes on each of its ranks.

    Attributes:
        activations: what F keeps until B, for all micro-batches that live at once, and one exit's logits.
    """

    layout: StageLayout
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Estimate:
    """A run. `parameters` counts copies of the shared projection once; `checkpoint` is in bytes."""

    data_size: int
    num_microbatches: int
    parameters: int
    checkpoint: int
    stages: tuple[StageEstimate, ...]


def estimate(config: Config, world_size: int, vocab_size: int) -> Estimate:
    """
    Raises:
        MeshError: so many processes don't fit the config.
    """
    data_size = data_parallel_size(config.parallel, world_size)
    training = config.training
    num_microbatches = count_microbatches(training.global_batch_size, training.micro_batch_size, data_size)
    layouts = place(config.model, config.exits, config.parallel)
    live = _live_microbatches(config, layouts, num_microbatches)
    shares = config.exits.projection == "shared"
    stages = tuple(
        _estimate_stage(config, layout, vocab_size, shares, at_once)
        for layout, at_once in zip(layouts, live, strict=True)
    )
    copies = sum(bool(layout.exits) for layout in layouts) - 1 if shares else 0
    parameters = sum(stage.parameters for stage in stages) - copies * vocab_size * config.model.hidden_size
    return Estimate(data_size, num_microbatches, parameters, parameters * BYTES * (1 + MOMENTS), stages)


def describe(estimated: Estimate, num_layers: int) -> str:
    """The estimate as a table, one line a stage."""
    lines = [
        f"parameters: {estimated.parameters:,}",
        f"checkpoint: {_size(estimated.checkpoint)}",
        f"data-parallel ranks: {estimated.data_size}, micro-batches a step: {estimated.num_microbatches}",
        "",
        f"{'stage':<7}{'layers':<10}{'exits':<16}{'weights':>11}{'gradients':>11}{'optimizer':>11}"
        f"{'activations':>13}{'each rank':>11}",
    ]
    for number, stage in enumerate(estimated.stages):
        exits = " ".join("final" if layer == num_layers else str(layer) for layer in stage.layout.exits) or "-"
        layers = f"{stage.layout.start + 1}-{stage.layout.stop}"
        sizes = (stage.weights, stage.gradients, stage.optimizer)
        columns = "".join(f"{_size(size):>11}" for size in sizes)
        lines.append(
            f"{number:<7}{layers:<10}{exits:<16}{columns}{_size(stage.activations):>13}{_size(stage.total):>11}"
        )
    return "\n".join(lines) + "\n"


def layer_parameters(model: ModelConfig) -> int:
    """Attention, SwiGLU and two norms."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    attention = (heads + model.num_attention_heads) * model.head_dim * model.hidden_size
    return attention + 3 * model.ffn_hidden_size * model.hidden_size + 2 * model.hidden_size


def layer_activations(model: ModelConfig) -> int:
    """Numbers that one layer keeps for its backward, per token.

    Both norms keep their input and output (the latter for the product after it); rotary positions keep queries and keys
    before they turn, attention keeps queries, keys, values and its output; SwiGLU keeps the gate, its silu and the
    other factor, and their product.
    """
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    return 4 * model.hidden_size + 3 * queries + 3 * keys + 4 * model.ffn_hidden_size


def _estimate_stage(
    config: Config, layout: StageLayout, vocab_size: int, shares: bool, live_microbatches: int
) -> StageEstimate:
    model = config.model
    matrix = vocab_size * model.hidden_size
    num_layers = layout.stop - layout.start
    projections = (1 if shares else len(layout.exits)) if layout.exits else 0
    parameters = num_layers * layer_parameters(model) + len(layout.exits) * model.hidden_size
    parameters += (layout.has_embedding + projections) * matrix
    tokens = config.training.micro_batch_size * config.data.sequence_length
    # X leaves a gradient at each exit, and the stage's input and output are kept
    kept = num_layers * layer_activations(model) + (len(layout.exits) + 2) * model.hidden_size
    logits = 3 * vocab_size if layout.exits else 0  # with their softmax and gradient, for one exit of one micro-batch
    return StageEstimate(
        layout,
        parameters,
        weights=parameters * BYTES,
        gradients=parameters * BYTES,
        optimizer=parameters * BYTES * MOMENTS,
        activations=(live_microbatches * kept + logits) * tokens * BYTES,
    )


def _live_microbatches(config: Config, layouts: tuple[StageLayout, ...], num_microbatches: int) -> tuple[int, ...]:
    plan = build_plan(
        config.parallel.schedule,
        num_stages=len(layouts),
        num_microbatches=num_microbatches,
        has_exits=[bool(layout.exits) for layout in layouts],
    )
    return simulate(plan, lambda action: 1.0).peak_activations


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
