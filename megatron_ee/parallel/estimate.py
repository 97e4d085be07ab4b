"""What a config costs on each rank, before anything is started: parameters, memory, checkpoint, and the placement."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_ee.config import Config, GateKind, HeadKind, ModelConfig, ParallelConfig
from megatron_ee.parallel.chunks import Chunk, Layout, count_idle, have_exits
from megatron_ee.parallel.costs import costs_of
from megatron_ee.parallel.layout import describe_layout, place
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import simulate
from megatron_ee.parallel.products import gate_width
from megatron_ee.parallel.world import count_microbatches, data_parallel_size

FP32 = 4  # bytes of a gradient, a moment or a master weight
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a parameter or an activation
MOMENTS = 2  # AdamW's

# Numbers that are kept: of both norms of a layer in hidden states, and of its MLP in units of its inner width.
_NORM_NUMBERS, _NORM_INPUTS = 6, 2
_MLP_NUMBERS = 3

Held = Collection[tuple[int, int]]
"""Micro-batches up to their B and those that wait for their W, at one time or another: see `Timeline.holdings`."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage, in numbers of parameters and in bytes, both on each of its ranks.

    Attributes:
        activations: what F keeps until B, and B until W where it is apart, for all micro-batches that live at once, and
            what one exit's X or one recomputed layer takes besides.
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
    """A run. `parameters` counts copies of the shared projection once; `checkpoint` is in bytes.

    Attributes:
        trained: of the parameters; what the checkpoint holds, with optimizer state.
        placement: a line for each stage: its layers, its exits and its share of the work.
    """

    data_size: int
    num_microbatches: int
    parameters: int
    trained: int
    checkpoint: int
    placement: tuple[str, ...]
    stages: tuple[StageEstimate, ...]


def estimate(config: Config, world_size: int, vocab_size: int) -> Estimate:
    """
    Raises:
        MeshError: so many processes don't fit the config.
        FieldError: see `read_costs`.
    """
    data_size = data_parallel_size(config.parallel, world_size)
    training = config.training
    num_microbatches = count_microbatches(training.global_batch_size, training.micro_batch_size, data_size)
    costs = costs_of(config, vocab_size)
    layout = place(config.model, config.exits, config.parallel, costs, depth=config.depth)
    holdings = _holdings(config, layout, num_microbatches)
    parameters = _all_parameters(config, vocab_size)
    only_exits = config.training.trains == "exits"
    trained = _exit_parameters(config, config.exits.layers, vocab_size) if only_exits else parameters
    return Estimate(
        data_size,
        num_microbatches,
        parameters,
        trained,
        trained * _checkpoint_bytes(config),
        tuple(describe_layout(layout, config.exits, costs)),
        tuple(
            _estimate_stage(config, chunks, vocab_size, held=held, data_size=data_size)
            for chunks, held in zip(layout, holdings, strict=True)
        ),
    )


def describe(estimated: Estimate) -> str:
    """The estimate as text: the whole model, the placement, and a table of memory, one line a stage."""
    lines = [
        f"parameters: {estimated.parameters:,}"
        + (f", {estimated.trained:,} of them trained" if estimated.trained < estimated.parameters else ""),
        f"checkpoint: {_size(estimated.checkpoint)}",
        f"data-parallel ranks: {estimated.data_size}, micro-batches a step: {estimated.num_microbatches}",
        "",
        *estimated.placement,
        "",
        f"{'stage':<7}{'weights':>11}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'each rank':>11}",
    ]
    for number, stage in enumerate(estimated.stages):
        sizes = (stage.weights, stage.gradients, stage.optimizer)
        columns = "".join(f"{_size(size):>11}" for size in sizes)
        lines.append(f"{number:<7}{columns}{_size(stage.activations):>13}{_size(stage.total):>11}")
    return "\n".join(lines) + "\n"


def layer_parameters(model: ModelConfig, ranks: int = 1) -> int:
    """Attention, SwiGLU and two norms, on one of the tensor-parallel ranks. What norms heads is whole on each."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    attention = heads * model.head_dim * model.hidden_size
    if model.qkv_bias:
        attention += (heads - model.num_attention_heads) * model.head_dim
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    return (attention + _mlp_parameters(model)) // ranks + norms


def head_parameters(model: ModelConfig, kind: HeadKind, ranks: int = 1) -> int:
    """What an exit has before its projection, on one of the tensor-parallel ranks: a norm at least."""
    before = {
        "norm": 0,
        "mlp": _mlp_parameters(model) // ranks + model.hidden_size,  # with the norm on its input
        "block": layer_parameters(model, ranks),
    }
    return before[kind] + model.hidden_size


def gate_parameters(model: ModelConfig, kind: GateKind) -> int:
    """Of an exit's gate, whole on every tensor-parallel rank: a norm, and one matrix or two, with biases."""
    if kind == "none":
        return 0
    size = model.hidden_size
    width = gate_width(size) if kind == "mlp" else size
    return size + (kind == "mlp") * (size + 1) * width + width + 1


def layer_activations(parallel: ParallelConfig, model: ModelConfig, recomputed: Collection[str] = ()) -> float:
    """Numbers that one layer keeps for its backward, per token, on one of the tensor-parallel ranks.

    Both norms keep their input, its normalised form and their output; attention keeps queries, keys and values,
    the first two turned by their positions, and its output; norms of queries and keys keep their input and its
    normalised form; SwiGLU keeps its input, gate and factor, and its output. Transformer Engine's fused layers keep
    less.

    Args:
        recomputed: modules that keep only their input. (Attention keeps no scores as it is: its core saves nothing.)
    """
    ranks = parallel.tensor
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    of_mlp = 0 if "mlp" in recomputed else _MLP_NUMBERS * model.ffn_hidden_size
    of_norms = _NORM_INPUTS if "layernorm" in recomputed else _NORM_NUMBERS
    of_hidden_states = of_norms * _hidden(parallel, model)
    of_heads = (2 + 2 * model.qk_norm) * (queries + keys)
    return of_hidden_states + (of_heads + of_mlp) / ranks


def weight_products(parallel: ParallelConfig, model: ModelConfig) -> float:
    """Numbers that one layer keeps from B to W, per token, on one of the tensor-parallel ranks: the input of each
    matrix, and its output's gradient."""
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    split = (2 * queries + 2 * keys + 3 * model.ffn_hidden_size) / parallel.tensor
    return 2 * _hidden(parallel, model) + split + 2 * model.hidden_size


def _estimate_stage(
    config: Config, chunks: tuple[Chunk, ...], vocab_size: int, *, held: Held, data_size: int
) -> StageEstimate:
    parameters = _stage_parameters(config, chunks, vocab_size)
    only_exits = config.training.trains == "exits"
    ranks = config.parallel.tensor
    trained = _exit_parameters(config, _exits_of(chunks), vocab_size, ranks) if only_exits else parameters
    size = BYTES[config.training.precision]
    masters = size < FP32
    shared_by = data_size if config.parallel.distributed_optimizer else 1
    return StageEstimate(
        chunks,
        parameters,
        weights=parameters * size,
        gradients=trained * FP32,
        optimizer=trained * FP32 * (MOMENTS + masters) // shared_by,
        activations=round(_stage_activations(config, chunks, vocab_size, held)),
    )


def _stage_parameters(config: Config, chunks: tuple[Chunk, ...], vocab_size: int) -> int:
    model, exits, ranks = config.model, config.exits, config.parallel.tensor
    own_exits = _exits_of(chunks)
    num_layers = sum(chunk.stop - chunk.start for chunk in chunks)
    has_embedding = any(chunk.has_embedding for chunk in chunks)
    borrows = model.tie_embeddings and has_embedding
    has_copy = any(exits.projection_of(layer) == "shared" for layer in own_exits) and not borrows
    shared = (has_embedding + has_copy) * vocab_size * model.hidden_size // ranks
    shared_norm = model.hidden_size if exits.norm == "shared" and own_exits else 0
    own = _exit_parameters(config, own_exits, vocab_size, ranks)
    return num_layers * layer_parameters(model, ranks) + shared + shared_norm + own


def _exit_parameters(config: Config, exits: Sequence[int], vocab_size: int, ranks: int = 1) -> int:
    """What these exits have of their own, on one of the tensor-parallel ranks."""
    model = config.model
    heads = sum(head_parameters(model, config.exits.head_of(layer), ranks) for layer in exits)
    gates = sum(gate_parameters(model, config.exits.gate_of(layer)) for layer in exits)
    shared_norms = len(exits) * model.hidden_size if config.exits.norm == "shared" else 0
    own_projections = sum(config.exits.projection_of(layer) == "own" for layer in exits)
    return heads - shared_norms + gates + own_projections * vocab_size * model.hidden_size // ranks


def _stage_activations(config: Config, chunks: tuple[Chunk, ...], vocab_size: int, held: Held) -> float:
    """In bytes: what all live micro-batches keep, and what one X or one recomputed layer has besides for a while."""
    model, parallel, exits, training = config.model, config.parallel, config.exits, config.training
    size, tokens = BYTES[training.precision], training.micro_batch_size * config.data.sequence_length
    if all(chunk.is_empty for chunk in chunks):
        return 0.0
    own_exits = _exits_of(chunks)
    num_layers = sum(chunk.stop - chunk.start for chunk in chunks)
    hidden = _hidden(parallel, model)
    whole_layer, kept_of_layer = _layer_activations(config)
    # X leaves a gradient at each exit, which waits for B or else is there once; a chunk's input and output are kept
    gradients = len(own_exits) * hidden
    if config.training.trains == "exits":
        kept_of_layer = 0.0  # and what waits at each exit is its hidden state
    waits = not exits.release and parallel.schedule != "megatron"
    of_microbatch = (num_layers * kept_of_layer + gradients * waits) / len(chunks) + 2 * hidden
    of_microbatch += _mask_numbers(config, chunks)
    in_passing = max(whole_layer - kept_of_layer, gradients * (not waits))
    if own_exits:
        in_passing = max(in_passing, *(_exit_activations(config, layer) for layer in own_exits))
    rows = min(exits.loss_chunk_rows or tokens, tokens) if own_exits else 0
    # logits with their softmax and gradient, in fp32; where exits are distilled, the final exit's and both gradients
    copies = 3 + 3 * (exits.distillation is not None and len(own_exits) > 1)
    logits = (copies * FP32 + (size if size < FP32 else 0)) * vocab_size / parallel.tensor
    of_waiting = num_layers * weight_products(parallel, model)
    of_all = max((before * of_microbatch + after * of_waiting for before, after in held), default=0.0)
    return (of_all + in_passing) * size * tokens + logits * rows


def _mask_numbers(config: Config, chunks: tuple[Chunk, ...]) -> float:
    """Numbers per token of the masks that layers share: of each kind of window, a row of each sequence where documents
    are packed; where they are not, windows alone need one, which all sequences share."""
    length = config.data.sequence_length
    layers = [layer for chunk in chunks for layer in range(chunk.start + 1, chunk.stop + 1)]
    seen = {min(length, config.model.window_of(layer) or length) for layer in layers}
    if config.data.format == "messages" and config.data.packing:
        return len(seen) * length
    return len(seen - {length}) * length / config.training.micro_batch_size


def _layer_activations(config: Config) -> tuple[float, float]:
    """Numbers per token of a layer: all of them, and those that are kept until its backward begins."""
    parallel, model, training = config.parallel, config.model, config.training
    whole = layer_activations(parallel, model)
    match training.recompute:
        case "full":
            return whole, _hidden(parallel, model)
        case "selective":
            return whole, layer_activations(parallel, model, training.recompute_modules)
        case "none":
            return whole, whole


def _exit_activations(config: Config, layer: int) -> float:
    """Numbers per token that an exit's head and gate keep from their forward to their backward, within X."""
    parallel, model = config.parallel, config.model
    norm = _NORM_NUMBERS / 2 * _hidden(parallel, model)
    before = {
        "norm": 0.0,
        "mlp": norm + _MLP_NUMBERS * model.ffn_hidden_size / parallel.tensor,
        "block": layer_activations(parallel, model),
    }
    of_gate = {"none": 0.0, "linear": norm, "mlp": norm + 2 * gate_width(model.hidden_size)}
    return before[config.exits.head_of(layer)] + norm + of_gate[config.exits.gate_of(layer)]


def _exits_of(chunks: tuple[Chunk, ...]) -> list[int]:
    return [layer for chunk in chunks for layer in chunk.exits]


def _hidden(parallel: ParallelConfig, model: ModelConfig) -> float:
    """Numbers of a hidden state per token of the sequence, on one rank."""
    return model.hidden_size / (parallel.tensor if parallel.sequence else 1)


def _mlp_parameters(model: ModelConfig) -> int:
    return 3 * model.ffn_hidden_size * model.hidden_size


def _all_parameters(config: Config, vocab_size: int) -> int:
    """Of the whole model; copies count once."""
    model, exits = config.model, config.exits
    own = _exit_parameters(config, (*exits.layers, model.num_layers), vocab_size)
    shared_norm = model.hidden_size if exits.norm == "shared" else 0
    shared = (1 + (not model.tie_embeddings)) * vocab_size * model.hidden_size
    return model.num_layers * layer_parameters(model) + shared + shared_norm + own


def _checkpoint_bytes(config: Config) -> int:
    """Of a parameter: itself, its moments, and its master copy where it is in half precision."""
    size = BYTES[config.training.precision]
    return size + MOMENTS * FP32 + (FP32 if size < FP32 else 0)


def _holdings(config: Config, layout: Layout, num_microbatches: int) -> tuple[Held, ...]:
    """How many micro-batches each stage holds at once, one in each of two chunks counting twice.

    Fills are taken only where they don't hold more than 1F1B does.
    """
    parallel = config.parallel
    alike = {"filled-1f1b": "1f1b", "megatron": "interleaved" if parallel.chunks > 1 else "1f1b"}
    only_exits = config.training.trains == "exits"
    plan = build_plan(
        "forward-only" if only_exits else alike.get(parallel.schedule, parallel.schedule),
        num_stages=len(layout) - count_idle(layout),
        num_idle=count_idle(layout),
        num_chunks=len(layout[0]),
        num_microbatches=num_microbatches,
        has_exits=have_exits(layout),
    )
    return simulate(plan, lambda action: 1.0).holdings


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
