"""Puts a run together: from a config to a trainer, at the run's beginning or at the point where it stopped."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Progress, read_description
from megatron_ee.checkpoint.folders import link_latest, newest_checkpoint
from megatron_ee.config import Config, OptimizerConfig, to_yaml
from megatron_ee.data.dataset import open_datasets
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import Device
from megatron_ee.errors import FieldError
from megatron_ee.log import start_logging
from megatron_ee.model.initialize import initialize
from megatron_ee.model.precision import DTYPES
from megatron_ee.model.stage import Stage
from megatron_ee.model.vocabulary import resolve_vocab_size
from megatron_ee.parallel.costs import costs_of
from megatron_ee.parallel.layout import Layout, describe_layout, have_exits, place
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.parallel.pipeline.schedules import TRAINING_SCHEDULES, Schedule, build_plan
from megatron_ee.parallel.pipeline.simulate import InvalidPlanError, check
from megatron_ee.plugins import PluginError, choose, load_plugins
from megatron_ee.tokenizer import open_tokenizer
from megatron_ee.training.evaluate import Evaluator
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loggers import check_loggers, open_loggers
from megatron_ee.training.lr_schedule import DECAYS, Decay, LearningRate
from megatron_ee.training.metrics import ExitMeter
from megatron_ee.training.optimizers import BACKENDS, OptimizerBackend
from megatron_ee.training.throughput import Throughput
from megatron_ee.training.trainer import Trainer


def build_trainer(config: Config, device: Device) -> Trainer:
    """This rank's trainer; every rank calls it. A run that has checkpoints goes on from the newest.

    Raises:
        UserError: the processes, the dataset or the run's checkpoints don't fit the config.
    """
    parts = _choose_parts(config)
    check_loggers(config.logging)
    mesh = open_mesh(config.parallel, device)
    log = start_logging(is_main_rank=mesh.is_main)
    if mesh.is_main:
        _announce(log, config, device)
    run_folder = Path(config.runs) / config.name
    checkpoint = _checkpoint_to_resume(config, run_folder)

    tokenizer = open_tokenizer(config.data.tokenizer)
    vocab_size = resolve_vocab_size(config.model, tokenizer)
    layout = _choose_layout(log, config, vocab_size)
    datasets = open_datasets(config, tokenizer, mesh, num_train_samples=_num_train_samples(config, checkpoint))
    stage = build_stage(config, layout, vocab_size, mesh)
    gradients = StageGradients(stage, mesh, layout)
    loader = _build_loader(config, datasets.train, mesh)
    runtime = Runtime(mesh, _message_between_stages(config, device))
    trainer = Trainer(
        config=config,
        run_folder=run_folder,
        description=_describe(config, tokenizer.name, vocab_size),
        tokenizer=tokenizer,
        mesh=mesh,
        stage=stage,
        gradients=gradients,
        optimizer=parts.optimizer_backend(stage, config.optimizer, mesh, gradients),
        learning_rate=LearningRate(config.optimizer, config.training.train_iters, parts.learning_rate_decay),
        loader=loader,
        runtime=runtime,
        plan=_build_plan(config.parallel.schedule, layout, loader.num_microbatches, parts.schedules),
        meter=ExitMeter(all_exits(config), mesh),
        throughput=Throughput(config, mesh, vocab_size=vocab_size),
        evaluator=_build_evaluator(config, datasets.valid, stage, runtime, layout, mesh),
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
        if mesh.is_main:
            link_latest(checkpoint)  # the run may have been killed just before it did
        log.info("resumed from %s", checkpoint)
    if mesh.is_main:
        _write_config(config, run_folder)
        trainer.loggers = open_loggers(config, run_folder, exits=all_exits(config), start=trainer.progress.iteration)
    return trainer


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the config chooses by name, built in or a plug-in's."""

    optimizer_backend: Callable[[Stage, OptimizerConfig, Mesh, StageGradients], OptimizerBackend]
    learning_rate_decay: Decay
    schedules: Mapping[str, Schedule]


def _choose_parts(config: Config) -> _Parts:
    plugins = load_plugins(config.plugins)
    optimizer = config.optimizer
    choose("parallel.schedule", config.parallel.schedule, TRAINING_SCHEDULES, plugins.pipeline_schedules)
    return _Parts(
        choose("optimizer.backend", optimizer.backend, BACKENDS, plugins.optimizer_backends),
        choose("optimizer.lr_decay", optimizer.lr_decay, DECAYS, plugins.learning_rate_decays),
        plugins.pipeline_schedules,
    )


def all_exits(config: Config) -> list[int]:
    """The early exits and the final one, ascending."""
    return [*config.exits.layers, config.model.num_layers]


def _announce(log: logging.Logger, config: Config, device: Device) -> None:
    log.info("%s", device.reason)
    warmup, total = config.exits.weight_schedule.warmup_iters, config.training.train_iters
    if config.exits.layers and config.exits.weight_schedule.shape != "constant" and warmup >= total:
        log.warning(
            "exits.weight_schedule.warmup_iters: %d is not below training.train_iters = %d, "
            "so the exits never reach their weights",
            warmup,
            total,
        )


def _choose_layout(log: logging.Logger, config: Config, vocab_size: int) -> Layout:
    costs = costs_of(config, vocab_size)
    layout = place(config.model, config.exits, config.parallel, costs)
    for line in describe_layout(layout, config.exits, costs):
        log.info("%s", line)
    return layout


def _checkpoint_to_resume(config: Config, run_folder: Path) -> Path | None:
    newest = newest_checkpoint(run_folder)
    if newest is not None and not config.checkpoint.resume:
        raise FieldError("checkpoint.resume", f"is false, but {run_folder} holds {newest.name}; take another name")
    return newest


def _num_train_samples(config: Config, checkpoint: Path | None) -> int:
    """What was drawn, and what is left to draw: the batch may be of another size since the run was resumed."""
    done = read_description(checkpoint).progress if checkpoint is not None else Progress(0, 0)
    left = max(0, config.training.train_iters - done.iteration)
    return max(1, done.consumed_samples + left * config.training.global_batch_size)


def _describe(config: Config, tokenizer: str, vocab_size: int) -> Description:
    return Description(
        model=config.model,
        exits=config.exits,
        precision=config.training.precision,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        progress=Progress(0, 0),
    )


def _write_config(config: Config, run_folder: Path) -> None:
    """The config that the run goes on with; one that was refused leaves the old file alone.

    Raises:
        FieldError: the run's folder cannot be written.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise FieldError("runs", f"{run_folder} cannot be written: {error.strerror}") from error


def build_stage(config: Config, layout: Layout, vocab_size: int, mesh: Mesh) -> Stage:
    """This rank's part of the model, with its initial parameters."""
    stage = Stage(
        config.model,
        config.exits,
        layout[mesh.pipeline_rank],
        vocab_size=vocab_size,
        groups=mesh.groups,
        device=mesh.device,
        dtype=DTYPES[config.training.precision],
        sequence_parallel=config.parallel.sequence,
    )
    initialize(stage, config.seed)
    return stage


def _build_loader(config: Config, source: SampleSource, mesh: Mesh) -> BatchLoader:
    return BatchLoader(
        source,
        mesh,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
    )


def _message_between_stages(config: Config, device: Device) -> MessageSpec:
    positions = config.data.sequence_length // (config.parallel.tensor if config.parallel.sequence else 1)
    shape = (positions, config.training.micro_batch_size, config.model.hidden_size)
    return MessageSpec(shape, DTYPES[config.training.precision], device.torch)


def _build_plan(
    schedule: str,
    layout: Layout,
    num_microbatches: int,
    more_schedules: Mapping[str, Schedule] | None = None,
) -> Plan:
    try:
        plan = build_plan(
            schedule,
            num_stages=len(layout),
            num_chunks=len(layout[0]),
            num_microbatches=num_microbatches,
            has_exits=have_exits(layout),
            more_schedules=more_schedules,
        )
        check(plan)
    except InvalidPlanError as error:  # a plug-in's; the built-in ones are tested
        raise PluginError("parallel.schedule", f"{schedule!r} gives an invalid plan: {error}") from error
    return plan


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
        _build_plan("forward-only", layout, loader.num_microbatches),
        ExitMeter(all_exits(config), mesh),
        mesh,
        num_batches=config.training.eval_iters,
        global_batch_size=config.training.global_batch_size,
    )
