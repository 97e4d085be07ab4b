"""Puts a run together: from a config to a trainer, at the run's beginning or at the point where it stopped."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ee.checkpoint.description import Description, Progress, read_description
from megatron_ee.checkpoint.folders import CheckpointError, newest_checkpoint
from megatron_ee.config import Config, OptimizerConfig, to_yaml
from megatron_ee.data.dataset import open_datasets
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import Device
from megatron_ee.log import start_logging
from megatron_ee.model.initialize import initialize
from megatron_ee.model.stage import Stage
from megatron_ee.model.vocabulary import resolve_vocab_size
from megatron_ee.parallel.layout import StageLayout, place
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.parallel.pipeline.schedules import SCHEDULES, Schedule, build_plan
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
    layouts = place(config.model, config.exits, config.parallel)
    if mesh.is_main:
        _announce(log, config, device, layouts)
    run_folder = Path(config.runs) / config.name
    checkpoint = _checkpoint_to_resume(config, run_folder)

    tokenizer = open_tokenizer(config.data.tokenizer)
    vocab_size = resolve_vocab_size(config.model, tokenizer)
    datasets = open_datasets(config, tokenizer, mesh, num_train_samples=_num_train_samples(config, checkpoint))
    stage = _build_stage(config, layouts, vocab_size, mesh)
    gradients = StageGradients(stage, mesh, layouts)
    loader = _build_loader(config, datasets.train, mesh)
    runtime = Runtime(mesh, _message_between_stages(config, device))
    trainer = Trainer(
        config=config,
        run_folder=run_folder,
        description=Description(config.model, config.exits, tokenizer.name, vocab_size, Progress(0, 0)),
        tokenizer=tokenizer,
        mesh=mesh,
        stage=stage,
        gradients=gradients,
        optimizer=parts.optimizer_backend(stage, config.optimizer, mesh, gradients),
        learning_rate=LearningRate(config.optimizer, config.training.train_iters, parts.learning_rate_decay),
        loader=loader,
        runtime=runtime,
        plan=_build_plan(config.parallel.schedule, layouts, loader.num_microbatches, parts.schedules),
        meter=ExitMeter(all_exits(config), mesh),
        throughput=Throughput(config, mesh, vocab_size=vocab_size),
        evaluator=_build_evaluator(config, datasets.valid, stage, runtime, layouts, mesh),
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
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
    choose("parallel.schedule", config.parallel.schedule, SCHEDULES, plugins.pipeline_schedules)
    return _Parts(
        choose("optimizer.backend", optimizer.backend, BACKENDS, plugins.optimizer_backends),
        choose("optimizer.lr_decay", optimizer.lr_decay, DECAYS, plugins.learning_rate_decays),
        plugins.pipeline_schedules,
    )


def all_exits(config: Config) -> list[int]:
    """The early exits and the final one, ascending."""
    return [*config.exits.layers, config.model.num_layers]


def _announce(log: logging.Logger, config: Config, device: Device, layouts: Sequence[StageLayout]) -> None:
    log.info("%s", device.reason)
    for number, layout in enumerate(layouts):
        early = [layer for layer in layout.exits if layer < config.model.num_layers]
        log.info("stage %d: layers %d-%d, exits after %s", number, layout.start + 1, layout.stop, early or "none")
    warmup, total = config.exits.weight_schedule.warmup_iters, config.training.train_iters
    if config.exits.layers and config.exits.weight_schedule.shape != "constant" and warmup >= total:
        log.warning(
            "exits.weight_schedule.warmup_iters: %d is not below training.train_iters = %d, "
            "so the exits never reach their weights",
            warmup,
            total,
        )


def _checkpoint_to_resume(config: Config, run_folder: Path) -> Path | None:
    newest = newest_checkpoint(run_folder)
    if newest is not None and not config.checkpoint.resume:
        raise CheckpointError(f"checkpoint.resume is false, but {run_folder} holds {newest.name}; take another name")
    return newest


def _num_train_samples(config: Config, checkpoint: Path | None) -> int:
    """What was drawn, and what is left to draw: the batch may be of another size since the run was resumed."""
    done = read_description(checkpoint).progress if checkpoint is not None else Progress(0, 0)
    left = max(0, config.training.train_iters - done.iteration)
    return max(1, done.consumed_samples + left * config.training.global_batch_size)


def _write_config(config: Config, run_folder: Path) -> None:
    """The config that the run goes on with; one that was refused leaves the old file alone."""
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "config.yaml").write_text(to_yaml(config))


def _build_stage(config: Config, layouts: Sequence[StageLayout], vocab_size: int, mesh: Mesh) -> Stage:
    layout = layouts[mesh.pipeline_rank]
    stage = Stage(config.model, config.exits, layout, vocab_size=vocab_size, groups=mesh.groups, device=mesh.device)
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
    shape = (config.data.sequence_length, config.training.micro_batch_size, config.model.hidden_size)
    return MessageSpec(shape, torch.float32, device.torch)


def _build_plan(
    schedule: str,
    layouts: Sequence[StageLayout],
    num_microbatches: int,
    more_schedules: Mapping[str, Schedule] | None = None,
) -> Plan:
    try:
        plan = build_plan(
            schedule,
            num_stages=len(layouts),
            num_microbatches=num_microbatches,
            has_exits=[bool(layout.exits) for layout in layouts],
            more_schedules=more_schedules,
        )
        check(plan)
    except InvalidPlanError as error:  # a plug-in's; the built-in ones are tested
        raise PluginError(f"parallel.schedule: {schedule!r} gives an invalid plan: {error}") from error
    return plan


def _build_evaluator(
    config: Config,
    source: SampleSource | None,
    stage: Stage,
    runtime: Runtime,
    layouts: Sequence[StageLayout],
    mesh: Mesh,
) -> Evaluator | None:
    if source is None:
        return None
    loader = _build_loader(config, source, mesh)
    return Evaluator(
        stage,
        loader,
        runtime,
        _build_plan("forward-only", layouts, loader.num_microbatches),
        ExitMeter(all_exits(config), mesh),
        mesh,
        num_batches=config.training.eval_iters,
        global_batch_size=config.training.global_batch_size,
    )
