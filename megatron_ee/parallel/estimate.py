"""What a config costs on each rank, before anything is started: parameters, memory, checkpoint, and the placement."""

from dataclasses import dataclass

from megatron_ee.config import Config, ModelConfig, ParallelConfig
from megatron_ee.parallel.layout import Chunk, Layout, have_exits, place
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.world import count_microbatches, data_parallel_size

FP32 = 4  # bytes of a gradient, a moment or a master weight
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a parameter or an activation
MOMENTS = 2  # AdamW's


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage, in numbers of parameters and in bytes, both on each of its ranks.

    Attributes:
        activations: what F keeps until B, for all micro-batches that live at once, and one exit's logits.
    """

    chunks: tuple[Chunk, ...]
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
    layout = place(config.model, config.exits, config.parallel)
    live = _live_microbatches(config, layout, num_microbatches)
    stages = tuple(
        _estimate_stage(config, chunks, vocab_size, at_once) for chunks, at_once in zip(layout, live, strict=True)
    )
    parameters = _all_parameters(config, vocab_size)
    return Estimate(data_size, num_microbatches, parameters, parameters * _checkpoint_bytes(config), stages)


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
        own_exits = [layer for chunk in stage.chunks for layer in chunk.exits]
        exits = " ".join("final" if layer == num_layers else str(layer) for layer in own_exits) or "-"
        layers = " ".join(f"{chunk.start + 1}-{chunk.stop}" for chunk in stage.chunks)
        sizes = (stage.weights, stage.gradients, stage.optimizer)
        columns = "".join(f"{_size(size):>11}" for size in sizes)
        lines.append(
            f"{number:<7}{layers:<10}{exits:<16}{columns}{_size(stage.activations):>13}{_size(stage.total):>11}"
        )
    return "\n".join(lines) + "\n"


def layer_parameters(model: ModelConfig, ranks: int = 1) -> int:
    """Attention, SwiGLU and two norms, on one of the tensor-parallel ranks."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    matrices = (heads * model.head_dim + 3 * model.ffn_hidden_size) * model.hidden_size
    return matrices // ranks + 2 * model.hidden_size


def layer_activations(parallel: ParallelConfig, model: ModelConfig, micro_batch_size: int = 1) -> float:
    """Numbers that one layer keeps for its backward, per token, on one of the tensor-parallel ranks.

    Both norms keep their input, its normalised form and their output; attention keeps queries, keys and values before
    and after rotary positions, and its output; rotary positions keep sines and cosines, which the sequences of a
    micro-batch share; SwiGLU keeps both factors, the gate's silu, the other factor once more, and their product.
    Transformer Engine's fused layers keep less.
    """
    ranks = parallel.tensor
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    of_split_matrices = 3 * queries + 3 * keys + 5 * model.ffn_hidden_size
    of_hidden_states = 6 * model.hidden_size / (ranks if parallel.sequence else 1)
    return of_hidden_states + of_split_matrices / ranks + 4 * model.head_dim / micro_batch_size


def _estimate_stage(
    config: Config, chunks: tuple[Chunk, ...], vocab_size: int, live_microbatches: int
) -> StageEstimate:
    model, parallel = config.model, config.parallel
    num_layers = sum(chunk.stop - chunk.start for chunk in chunks)
    num_exits = sum(len(chunk.exits) for chunk in chunks)
    shares = config.exits.projection == "shared"
    matrices = any(chunk.has_embedding for chunk in chunks) + (min(1, num_exits) if shares else num_exits)
    parameters = num_layers * layer_parameters(model, parallel.tensor) + num_exits * model.hidden_size
    parameters += matrices * vocab_size * model.hidden_size // parallel.tensor

    hidden = model.hidden_size / (parallel.tensor if parallel.sequence else 1)
    of_a_layer = layer_activations(parallel, model, config.training.micro_batch_size)
    # X leaves a gradient at each exit, and each chunk's input and output are kept
    of_a_chunk = num_layers / len(chunks) * of_a_layer + (num_exits / len(chunks) + 2) * hidden
    tokens = config.training.micro_batch_size * config.data.sequence_length
    size = BYTES[config.training.precision]
    half = size < FP32
    logits = (3 * FP32 + half * size) * vocab_size / parallel.tensor if num_exits else 0  # of one exit: with their
    # softmax and gradient, in fp32
    return StageEstimate(
        chunks,
        parameters,
        weights=parameters * size,
        gradients=parameters * FP32,
        optimizer=parameters * FP32 * (MOMENTS + half),
        activations=round((live_microbatches * of_a_chunk * size + logits) * tokens),
    )


def _all_parameters(config: Config, vocab_size: int) -> int:
    """Of the whole model; copies count once."""
    model, num_exits = config.model, len(config.exits.layers) + 1
    matrices = 1 + (1 if config.exits.projection == "shared" else num_exits)
    norms = num_exits * model.hidden_size
    return model.num_layers * layer_parameters(model) + norms + matrices * vocab_size * model.hidden_size


def _checkpoint_bytes(config: Config) -> int:
    """Of a parameter: itself, its moments, and its master copy where it is in half precision."""
    size = BYTES[config.training.precision]
    return size + MOMENTS * FP32 + (FP32 if size < FP32 else 0)


def _live_microbatches(config: Config, layout: Layout, num_microbatches: int) -> tuple[int, ...]:
    """How many micro-batches each stage holds at once, one in each of two chunks counting twice."""
    plan = build_plan(
        config.parallel.schedule,
        num_stages=len(layout),
        num_chunks=len(layout[0]),
        num_microbatches=num_microbatches,
        has_exits=have_exits(layout),
    )
    return simulate(plan, lambda action: 1.0).peak_activations


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
