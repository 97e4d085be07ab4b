"""Builds the parts of a rank from a config, and a trainer from the parts; nothing here reads or writes a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.initial import load_initial, origin_of
from megatron_ee.checkpoint.sources import ModelSource
from megatron_ee.config import Config, TrainingConfig
from megatron_ee.data.dataset import Datasets
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import Device
from megatron_ee.errors import FieldError
from megatron_ee.model.initialize import initialize
from megatron_ee.model.layers import Recompute
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.model.trainable import train_only_exits
from megatron_ee.parallel.chunks import Layout
from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.training.evaluate import Evaluator
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.layer_dropout import LayerDropout
from megatron_ee.training.lr_schedule import DECAYS, Decay, LearningRate
from megatron_ee.training.megatron_runtime import MegatronRuntime
from megatron_ee.training.observation.metrics import ExitMeter
from megatron_ee.training.observation.phases import PhaseTimer
from megatron_ee.training.observation.profiler import Profiler
from megatron_ee.training.observation.throughput import Throughput
from megatron_ee.training.observation.tracer import Tracer
from megatron_ee.training.operations.alarms import Alarms
from megatron_ee.training.operations.saving import Saving
from megatron_ee.training.operations.skipping import SkippedSteps
from megatron_ee.training.optimizers import BACKENDS, Backend
from megatron_ee.training.planning import MEGATRON, ZERO_BUBBLE, plan_validation
from megatron_ee.training.trainer import Trainer


def assemble_trainer(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    datasets: Datasets,
    *,
    vocab_size: int,
    layout: Layout,
    plan: Plan,
    initial: ModelSource | None = None,
    kept_files: Mapping[str, bytes] = MappingProxyType({}),
    optimizer_backend: Backend | None = None,
    learning_rate_decay: Decay | None = None,
) -> Trainer:
    """A trainer at its first iteration, without loggers.

    Args:
        vocab_size: the resolved size.
        initial: what holds the parameters to begin with; None: they are random.
        kept_files: name -> content of what its checkpoints have beside the tokenizer's files, or instead of them.
        optimizer_backend, learning_rate_decay: None: the built-in ones that the config names.
    """
    stage = build_stage(config, layout, vocab_size, mesh, initial)
    gradients = StageGradients(stage, mesh, config.parallel, varies=gradients_vary(config))
    message = message_between_stages(config, mesh.device)
    decay = learning_rate_decay or DECAYS[config.optimizer.lr_decay]
    return Trainer(
        config=config,
        run_folder=run_folder_of(config),
        description=replace(describe(config, tokenizer.name, vocab_size), initial=origin_of(initial)),
        tokenizer=tokenizer,
        mesh=mesh,
        stage=stage,
        gradients=gradients,
        optimizer=(optimizer_backend or BACKENDS[config.optimizer.backend])(stage, config.optimizer, mesh, gradients),
        learning_rate=LearningRate(config.optimizer, config.training.train_iters, decay),
        loader=_build_loader(config, datasets.train, mesh, num_fills=len(plan.fills)),
        runtime=build_runtime(config, mesh, message, stage, gradients),
        plan=plan,
        meter=ExitMeter(all_exits(config), mesh, gated=config.exits.gated),
        skipped=SkippedSteps(mesh, config.faults.max_nonfinite),
        alarms=Alarms(config.faults, mesh, last_exit=all_exits(config)[-1]),
        timer=PhaseTimer(mesh, plan if config.parallel.schedule != MEGATRON else None),
        throughput=Throughput(config, mesh, vocab_size=vocab_size),
        tracer=Tracer(config.logging.trace_iterations, plan, mesh, run_folder_of(config) / "traces"),
        profiler=Profiler(config.logging.profile, mesh, run_folder_of(config) / "profiles"),
        evaluator=_build_evaluator(config, datasets.valid, stage, Runtime(mesh, message), layout, mesh),
        layer_dropout=build_layer_dropout(config),
        saving=Saving(config, run_folder_of(config), mesh, {**tokenizer.files(), **kept_files}),
    )


def run_folder_of(config: Config) -> Path:
    return Path(config.runs) / config.name


def all_exits(config: Config) -> list[int]:
    """The early exits, and the final one where training has it, ascending."""
    return list(config.trained_exits)


def build_stage(
    config: Config, layout: Layout, vocab_size: int, mesh: Mesh, initial: ModelSource | None = None
) -> Stage:
    """This rank's part of the model, with its initial parameters. Collective.

    Args:
        initial: what holds the parameters to begin with; None: they are random.

    Raises:
        FieldError: see `load_initial`; or something is to be recomputed or to be done later that this device's layers
            cannot.
    """
    stage = Stage(
        config.model,
        config.exits,
        layout[mesh.pipeline_rank],
        vocab_size=vocab_size,
        groups=mesh.groups,
        device=mesh.device,
        dtype=DTYPES[config.training.precision],
        sequence_parallel=config.parallel.sequence,
        recompute=_recompute(config.training, mesh.device),
        defer_weight_gradients=_defers_weight_gradients(config, mesh.device),
    )
    initialize(stage, config.seed)
    if config.training.trains == "exits":
        train_only_exits(stage)
    if initial is not None:
        load_initial(initial, stage, mesh, config.exits)
    return stage


def gradients_vary(config: Config) -> bool:
    """Whether it depends on the step and the data rank which parameters get a gradient."""
    return config.training.layer_dropout is not None or config.exits.layerskip is not None


def build_layer_dropout(config: Config) -> LayerDropout | None:
    training = config.training
    if training.layer_dropout is None:
        return None
    return LayerDropout(
        training.layer_dropout,
        seed=config.seed,
        num_layers=config.model.num_layers,
        train_iters=training.train_iters,
    )


def build_runtime(
    config: Config, mesh: Mesh, message: MessageSpec, stage: Stage, gradients: StageGradients
) -> Runtime | MegatronRuntime:
    """What executes a training step's plan."""
    if config.parallel.schedule != MEGATRON:
        return Runtime(mesh, message)
    return MegatronRuntime(mesh, message, stage.config, num_chunks=config.parallel.chunks, no_sync=gradients.no_sync)


def _recompute(training: TrainingConfig, device: Device) -> Recompute:
    modules = training.recompute_modules if training.recompute == "selective" else ()
    if "layernorm" in modules and not device.has_transformer_engine:
        raise FieldError(
            "training.recompute_modules",
            "layernorm needs Transformer Engine's layers, and this device has megatron-core's own",
        )
    return Recompute(layers=training.recompute == "full", modules=modules)


def _defers_weight_gradients(config: Config, device: Device) -> bool:
    defers = config.parallel.schedule == ZERO_BUBBLE
    if defers and device.has_transformer_engine:
        raise FieldError(
            "parallel.schedule",
            f"{ZERO_BUBBLE} needs megatron-core's own layers, and this device has Transformer Engine's",
        )
    return defers


def _build_loader(config: Config, source: SampleSource, mesh: Mesh, *, num_fills: int = 0) -> BatchLoader:
    return BatchLoader(
        source,
        mesh,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        num_fills=num_fills,
    )


def message_between_stages(config: Config, device: Device) -> MessageSpec:
    positions = config.data.sequence_length // (config.parallel.tensor if config.parallel.sequence else 1)
    shape = (positions, config.training.micro_batch_size, config.model.hidden_size)
    return MessageSpec(shape, DTYPES[config.training.precision], device.torch)


def _build_evaluator(
    config: Config,
    source: SampleSource | None,
    stage: Stage,
    runtime: Runtime,
    layout: Layout,
    mesh: Mesh,
) -> Evaluator | None:
    if source is None:
        return None
    loader = _build_loader(config, source, mesh)
    return Evaluator(
        stage,
        loader,
        runtime,
        plan_validation(layout, loader.num_microbatches),
        ExitMeter(all_exits(config), mesh, gated=config.exits.gated),
        mesh,
        num_batches=config.training.eval_iters,
        global_batch_size=config.training.global_batch_size,
        exits=config.exits,
    )


def describe(config: Config, tokenizer: str, vocab_size: int) -> Description:
    """The model that a run of this config trains."""
    return Description(
        model=config.model,
        exits=config.exits,
        precision=config.training.precision,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        progress=Progress(0, 0),
        trains=config.training.trains,
    )
