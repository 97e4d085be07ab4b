"""Puts a run together: from a config to a trainer, at the run's beginning or at the point where it stopped."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.folders import CheckpointError, newest_checkpoint
from megatron_ee.config import Config, to_yaml
from megatron_ee.data.dataset import open_datasets
from megatron_ee.data.loader import BatchLoader, SampleSource
from megatron_ee.device import Device
from megatron_ee.errors import UserError
from megatron_ee.log import start_logging
from megatron_ee.model.initialize import initialize
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.layout import StageLayout, place
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import check
from megatron_ee.tokenizer import Tokenizer, open_tokenizer, padded_vocab_size
from megatron_ee.training.evaluate import Evaluator
from megatron_ee.training.loggers import Console, JsonLines, Logger
from megatron_ee.training.metrics import ExitMeter
from megatron_ee.training.optimizer import StageOptimizer
from megatron_ee.training.trainer import Trainer


def build_trainer(config: Config, device: Device) -> Trainer:
    """This rank's trainer; every rank calls it. A run that has checkpoints goes on from the newest.

    Raises:
        UserError: the processes, the dataset or the run's checkpoints don't fit the config.
    """
    mesh = open_mesh(config.parallel, device)
    log = start_logging(is_main_rank=mesh.is_main)
    log.info("%s", device.reason)
    layouts = place(config.model, config.exits, config.parallel)
    if mesh.is_main:
        _announce(log, config, layouts)
    run_folder = Path(config.runs) / config.name
    checkpoint = _checkpoint_to_resume(config, run_folder, mesh)

    tokenizer = open_tokenizer(config.data.tokenizer)
    vocab_size = resolve_vocab_size(config, tokenizer)
    datasets = open_datasets(config, tokenizer, mesh)
    stage = _build_stage(config, layouts, vocab_size, mesh)
    loader = _build_loader(config, datasets.train, mesh)
    shape = (config.data.sequence_length, config.training.micro_batch_size, config.model.hidden_size)
    runtime = Runtime(mesh, MessageSpec(shape, torch.float32, device.torch))
    trainer = Trainer(
        config=config,
        run_folder=run_folder,
        description=Description(config.model, config.exits, config.data.tokenizer, vocab_size, Progress(0, 0)),
        mesh=mesh,
        stage=stage,
        optimizer=StageOptimizer(stage, config.optimizer, mesh, layouts),
        loader=loader,
        runtime=runtime,
        plan=_build_plan(config.parallel.schedule, layouts, loader.num_microbatches),
        meter=ExitMeter(all_exits(config), mesh),
        evaluator=_build_evaluator(config, datasets.valid, stage, runtime, layouts, mesh),
    )
    if checkpoint is not None:
        trainer.load(checkpoint)
        log.info("resumed from %s", checkpoint)
    if mesh.is_main:
        trainer.loggers = _open_loggers(config, run_folder, trainer.progress)
    return trainer


def all_exits(config: Config) -> list[int]:
    """The early exits and the final one, ascending."""
    return [*config.exits.layers, config.model.num_layers]


def resolve_vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    """
    Raises:
        UserError: the model's vocabulary cannot hold the tokenizer's.
    """
    if config.model.vocab_size == "auto":
        return padded_vocab_size(tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens"
        )
    return config.model.vocab_size


def _announce(log: logging.Logger, config: Config, layouts: Sequence[StageLayout]) -> None:
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


def _checkpoint_to_resume(config: Config, run_folder: Path, mesh: Mesh) -> Path | None:
    newest = newest_checkpoint(run_folder)
    if newest is not None and not config.checkpoint.resume:
        raise CheckpointError(f"checkpoint.resume is false, but {run_folder} holds {newest.name}; take another name")
    if mesh.is_main:
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "config.yaml").write_text(to_yaml(config))
    mesh.barrier()
    return newest


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


def _build_plan(schedule: str, layouts: Sequence[StageLayout], num_microbatches: int) -> Plan:
    plan = build_plan(
        schedule,
        num_stages=len(layouts),
        num_microbatches=num_microbatches,
        has_exits=[bool(layout.exits) for layout in layouts],
    )
    check(plan)
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


def _open_loggers(config: Config, run_folder: Path, progress: Progress) -> list[Logger]:
    console = Console(all_exits(config), start=progress.iteration, train_iters=config.training.train_iters)
    return [console, JsonLines(run_folder / "metrics.jsonl")]
