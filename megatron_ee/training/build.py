"""Puts a run together: from a config to a trainer, at the run's beginning or at the point where it stopped."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Progress, read_description
from megatron_ee.checkpoint.folders import DamagedError, newest_checkpoint
from megatron_ee.checkpoint.from_huggingface import model_files, read_files
from megatron_ee.checkpoint.initial import open_initial
from megatron_ee.checkpoint.resume import ResumableCheckpoints
from megatron_ee.config import Config, to_yaml
from megatron_ee.data.dataset import open_datasets
from megatron_ee.device import Device
from megatron_ee.environment import describe_environment
from megatron_ee.errors import FieldError
from megatron_ee.log import start_logging
from megatron_ee.model.vocabulary import resolve_vocab_size
from megatron_ee.parallel.chunks import Layout
from megatron_ee.parallel.costs import costs_of
from megatron_ee.parallel.layout import describe_layout, layout_of
from megatron_ee.parallel.mesh import TIMEOUT, Mesh, open_mesh
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.schedules import TRAINING_SCHEDULES, Schedule
from megatron_ee.parallel.world import count_microbatches
from megatron_ee.plugins import choose, load_plugins
from megatron_ee.tokenizer import Tokenizer, open_tokenizer
from megatron_ee.tokenizer.chat import CHAT_TEMPLATE_FILE, template_files
from megatron_ee.training.assemble import all_exits, assemble_trainer, describe, run_folder_of
from megatron_ee.training.exit_objectives import check_learners
from megatron_ee.training.loggers import check_loggers, open_loggers
from megatron_ee.training.lr_schedule import DECAYS, Decay
from megatron_ee.training.operations.attempts import Attempt, open_attempt
from megatron_ee.training.operations.run_lock import RunLock
from megatron_ee.training.operations.stopping import StopRequests
from megatron_ee.training.optimizers import BACKENDS, Backend, check_backend
from megatron_ee.training.planning import FILLED, plan_step, schedule_of
from megatron_ee.training.trainer import Trainer


def build_trainer(config: Config, device: Device, stop_requests: StopRequests | None = None) -> Trainer:
    """This rank's trainer; every rank calls it. A run that has checkpoints goes on from the newest.

    Args:
        stop_requests: what may end training early; None: nothing but the config's exit_duration, from now on.

    Raises:
        UserError: the processes, the dataset or the run's checkpoints don't fit the config.
    """
    parts = _choose_parts(config)
    check_backend(config.optimizer.backend, device)
    check_loggers(config.logging)
    # a rank that hangs is to be named before torch gives up on its messages
    mesh = open_mesh(config.parallel, device, timeout=max(TIMEOUT, 2 * timedelta(seconds=config.faults.hang_timeout)))
    start_logging(is_main_rank=mesh.is_main)
    run_folder = run_folder_of(config)
    lock = RunLock(run_folder)
    mesh.from_main(lock.take_if_begun)
    checkpoints = _resumable_checkpoints(config, run_folder, mesh)
    trainer = _build_newest(config, mesh, parts, checkpoints)
    trainer.stop_requests = stop_requests or StopRequests(config.training.exit_duration)
    trainer.attempt = mesh.from_main(lambda: _begin_attempt(config, run_folder, lock))
    trainer.lock = lock
    if mesh.is_main:
        trainer.loggers = open_loggers(config, run_folder, exits=all_exits(config), start=trainer.progress.iteration)
    return trainer


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the config chooses by name, built in or a plug-in's."""

    optimizer_backend: Backend
    learning_rate_decay: Decay
    schedules: Mapping[str, Schedule]


def _choose_parts(config: Config) -> _Parts:
    plugins = load_plugins(config.plugins)
    optimizer = config.optimizer
    if config.training.trains == "all":
        choose("parallel.schedule", schedule_of(config), TRAINING_SCHEDULES, plugins.pipeline_schedules)
    return _Parts(
        choose("optimizer.backend", optimizer.backend, BACKENDS, plugins.optimizer_backends),
        choose("optimizer.lr_decay", optimizer.lr_decay, DECAYS, plugins.learning_rate_decays),
        plugins.pipeline_schedules,
    )


def _build_newest(config: Config, mesh: Mesh, parts: _Parts, checkpoints: ResumableCheckpoints) -> Trainer:
    """A trainer at the newest good checkpoint, or at the run's beginning. That a checkpoint's shards are not what was
    saved is found out when they are loaded: then another trainer is built, for the checkpoint before."""
    checkpoint = checkpoints.newest()
    tokenizer = open_tokenizer(config.data.tokenizer)
    vocab_size = resolve_vocab_size(config.model, tokenizer)
    layout, plan = _lay_out(config, vocab_size, mesh, parts.schedules)
    while True:
        resumed = read_description(checkpoint) if checkpoint is not None else None
        initial = open_initial(config, describe(config, tokenizer.name, vocab_size), mesh, resumed=resumed)
        num_samples = _num_train_samples(config, resumed, plan, mesh)
        trainer = assemble_trainer(
            config,
            mesh,
            tokenizer,
            open_datasets(config, tokenizer, mesh, num_train_samples=num_samples),
            vocab_size=vocab_size,
            layout=layout,
            plan=plan,
            initial=initial,
            kept_files=_kept_files(config, tokenizer, checkpoint or (initial.path if initial else None)),
            optimizer_backend=parts.optimizer_backend,
            learning_rate_decay=parts.learning_rate_decay,
        )
        if checkpoint is None or _goes_on(trainer, checkpoint, checkpoints):
            return trainer
        del trainer
        mesh.device.free_memory()  # the next trainer needs it
        checkpoint = checkpoints.newest()


def _kept_files(config: Config, tokenizer: Tokenizer, folder: Path | None) -> dict[str, bytes]:
    """What the run's checkpoints have beside its own state and the tokenizer: what came with the model in `folder`, and
    how conversations are written, where the tokenizer doesn't say that."""
    files = model_files(folder)
    if config.data.format == "messages":
        return files | template_files(config.data.chat_template, tokenizer)
    if folder is not None and CHAT_TEMPLATE_FILE not in tokenizer.files():
        return files | read_files(folder, [CHAT_TEMPLATE_FILE])
    return files


def _goes_on(trainer: Trainer, checkpoint: Path, checkpoints: ResumableCheckpoints) -> bool:
    try:
        trainer.load(checkpoint)
    except DamagedError as error:
        checkpoints.pass_over(checkpoint, error)
        return False
    checkpoints.accept(checkpoint)
    logging.getLogger("megatron_ee").info("resumed from %s", checkpoint)
    return True


def _lay_out(
    config: Config, vocab_size: int, mesh: Mesh, more_schedules: Mapping[str, Schedule]
) -> tuple[Layout, Plan]:
    """Where all is, and in what order it runs; the main rank says so."""
    layout = layout_of(config, vocab_size)
    check_learners(config, layout)
    plan = _plan_step(config, layout, vocab_size, mesh, more_schedules)
    if mesh.is_main:
        _announce(config, mesh.device, layout, plan, vocab_size)
    return layout, plan


def _announce(config: Config, device: Device, layout: Layout, plan: Plan, vocab_size: int) -> None:
    log = logging.getLogger("megatron_ee")
    log.info("%s", device.reason)
    for line in describe_layout(layout, config.exits, costs_of(config, vocab_size)):
        log.info("%s", line)
    if config.parallel.schedule == FILLED:
        kinds = [fill.kind for fill in plan.fills]
        warmup, cooldown = kinds.count("warmup"), kinds.count("cooldown")
        log.info("fills: %d warm-up and %d cool-down micro-batches beside %d", warmup, cooldown, plan.num_regular)
    layers = config.exits.layers if config.exits.layerskip is None else ()
    schedules = map(config.exits.weight_schedule_of, layers)
    warmup = max((schedule.warmup_iters for schedule in schedules if schedule.shape != "constant"), default=-1)
    if warmup >= config.training.train_iters:
        log.warning(
            "exits.weight_schedule.warmup_iters: %d is not below training.train_iters = %d, "
            "so the exits never reach their weights",
            warmup,
            config.training.train_iters,
        )


def _resumable_checkpoints(config: Config, run_folder: Path, mesh: Mesh) -> ResumableCheckpoints:
    newest = mesh.from_main(lambda: newest_checkpoint(run_folder))
    if newest is not None and not config.checkpoint.resume:
        raise FieldError("checkpoint.resume", f"is false, but {run_folder} holds {newest.name}; take another name")
    return ResumableCheckpoints(run_folder, mesh, verifies=config.checkpoint.verify)


def _num_train_samples(config: Config, resumed: Description | None, plan: Plan, mesh: Mesh) -> int:
    """What was drawn, and what is left to draw: the batch may be of another size since the run was resumed."""
    done = resumed.progress if resumed is not None else Progress(0, 0)
    left = max(0, config.training.train_iters - done.iteration)
    return max(1, done.consumed_samples + left * samples_per_step(config, plan, mesh))


def samples_per_step(config: Config, plan: Plan, mesh: Mesh) -> int:
    """Of all ranks, with fills."""
    return plan.num_microbatches * config.training.micro_batch_size * mesh.data_size


def _begin_attempt(config: Config, run_folder: Path, lock: RunLock) -> Attempt:
    """Leave the config that the run goes on with; one that was refused leaves the old file alone.

    Raises:
        FieldError: the run's folder cannot be written, or another process trains the run.
    """
    lock.take()
    try:
        (run_folder / "config.yaml").write_text(to_yaml(config))
        return open_attempt(run_folder, config=to_yaml(config), environment=describe_environment())
    except OSError as error:
        raise FieldError("runs", f"{run_folder} cannot be written: {error.strerror}") from error


def _plan_step(
    config: Config, layout: Layout, vocab_size: int, mesh: Mesh, more_schedules: Mapping[str, Schedule]
) -> Plan:
    training = config.training
    num_microbatches = count_microbatches(training.global_batch_size, training.micro_batch_size, mesh.data_size)
    return plan_step(config, layout, vocab_size, num_microbatches, more_schedules=more_schedules)
