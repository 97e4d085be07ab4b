"""The training loop."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.sharded import check_same_model, load_checkpoint, load_verified, trained_state
from megatron_ee.config import Config
from megatron_ee.data.batch import Batch
from megatron_ee.data.loader import BatchLoader
from megatron_ee.model.layer_drop import KeptRows
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh, close_mesh
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import ActionWatch, Runtime
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.training.evaluate import Evaluator
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.layer_dropout import LayerDropout
from megatron_ee.training.loggers import Figures, Logger
from megatron_ee.training.loss_weights import weights_at
from megatron_ee.training.losses import ExitLoss, count_tokens
from megatron_ee.training.lr_schedule import LearningRate
from megatron_ee.training.megatron_runtime import MegatronRuntime
from megatron_ee.training.observation.metrics import ExitMeter
from megatron_ee.training.observation.phases import PhaseTimer
from megatron_ee.training.observation.profiler import Profiler
from megatron_ee.training.observation.throughput import Throughput, peak_memory
from megatron_ee.training.observation.tracer import Tracer
from megatron_ee.training.operations.alarms import Alarms
from megatron_ee.training.operations.attempts import STOPPED, Attempt
from megatron_ee.training.operations.heartbeat import Heartbeat
from megatron_ee.training.operations.roll_call import call_roll
from megatron_ee.training.operations.run_lock import RunLock
from megatron_ee.training.operations.saving import Saving
from megatron_ee.training.operations.skipping import DivergedError, SkippedSteps
from megatron_ee.training.operations.stopping import StopRequests
from megatron_ee.training.operations.watchdog import watch_over
from megatron_ee.training.operations.whereabouts import Whereabouts
from megatron_ee.training.optimizers import OptimizerBackend
from megatron_ee.training.stage_step import StageStep


@dataclass
class Trainer:
    """Everything one rank needs to train its stage; `build_trainer` puts it together.

    All ranks call the same methods in the same order. Only the main rank has loggers.
    """

    config: Config
    run_folder: Path
    description: Description
    tokenizer: Tokenizer
    mesh: Mesh
    stage: Stage
    gradients: StageGradients
    optimizer: OptimizerBackend
    learning_rate: LearningRate
    loader: BatchLoader
    runtime: Runtime | MegatronRuntime
    plan: Plan
    meter: ExitMeter
    skipped: SkippedSteps
    alarms: Alarms
    timer: PhaseTimer
    throughput: Throughput
    tracer: Tracer
    profiler: Profiler
    evaluator: Evaluator | None
    saving: Saving
    layer_dropout: LayerDropout | None = None
    progress: Progress = Progress(0, 0)
    loggers: Sequence[Logger] = ()
    stop_requests: StopRequests = field(default_factory=StopRequests)
    attempt: Attempt | None = None
    lock: RunLock | None = None
    whereabouts: Whereabouts = field(default_factory=Whereabouts)

    def train(self, until: int | None = None) -> str:
        """Run iterations up to `until` (default: all), logging, validating and saving on the way.

        Returns:
            Why it stopped early, with a checkpoint of where it was: one of `stopping.REASONS`, and "" where it did not.

        Raises:
            SaveError: the checkpoint of where it ended or stopped could not be written.
        """
        training = self.config.training
        stop = training.train_iters if until is None else min(until, training.train_iters)
        start = self.progress.iteration
        while (iteration := self.progress.iteration) < stop:
            number = iteration + 1
            self.whereabouts.enter("start", number)
            with self.timer.rank_wait():
                answers = call_roll(
                    self.mesh,
                    reason=self.stop_requests.reason(),
                    is_writing=self.saving.is_writing(),
                    cross_entropy=self.alarms.own_cross_entropy,
                )
            self.alarms.hear(iteration, answers.cross_entropy)
            if self.saving.is_pending and not answers.is_writing:
                with self.timer.phase("checkpoint"):
                    self.saving.settle()
            if answers.reason:
                if iteration > start:
                    self.save()
                return answers.reason
            with self.tracer.step(number) as recorders, self.profiler.step(number) as ranges, self.timer.step():
                with self.timer.phase("data"):
                    batch = self.loader.batch(self.progress.consumed_samples)
                gradient_norm = self.train_step(batch, iteration, watches=(*recorders, *ranges))
            consumed = self.progress.consumed_samples + self.loader.samples_per_batch
            self.progress = Progress(iteration + 1, consumed)
            self._do_what_is_due(iteration, gradient_norm)
        self.saving.settle()
        if self.progress.iteration == training.train_iters:
            self.save()  # once more, if that has failed
        return ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around training in processes that do nothing else: what is wrong with one ends the job. Collective."""
        faults, mesh, attempt = self.config.faults, self.mesh, self.attempt
        assert attempt is not None, "the run has not been begun"
        heartbeat = Heartbeat(self.run_folder, interval=faults.heartbeat_interval, attempt=attempt.number)
        with watch_over(
            attempt,
            hang_timeout=faults.hang_timeout,
            rank=mesh.rank,
            stage=mesh.pipeline_rank,
            barrier=mesh.barrier,
            beat=heartbeat.beat if mesh.is_main else lambda _: None,
        ) as (self.whereabouts, watchdog):
            self.stop_requests.last_words = watchdog.look
            self.timer.tell = self.whereabouts.enter
            yield

    def train_step(self, batch: Batch, iteration: int, *, watches: Sequence[ActionWatch] = ()) -> float | None:
        """One optimizer step on one global batch; returns the gradient norm, or None where the step was skipped."""
        with self.timer.phase("prepare"):
            tokens = count_tokens(batch, self.plan, self.mesh)
            loss_scale, weights = self.optimizer.loss_scale, self._weights(iteration)
            step = StageStep(
                self.stage,
                batch,
                self.plan,
                tokens,
                {layer: weight * loss_scale for layer, weight in weights.items()},
                exits=self.config.exits,
                loss_scale=loss_scale,
                no_sync=self.gradients.no_sync,
                kept=self._kept(iteration),
                settle=self.gradients.settle,
            )
            self.gradients.zero()
        with self.timer.pipeline() as timers:
            self.runtime.run(self.plan, step, watches=(self.whereabouts, *watches, *timers))
        with self.timer.phase("grad_sync"):
            self.gradients.reduce(tokens.gradient_factor)
        with self.timer.phase("optimizer"):
            gradient_norm = self.optimizer.step(self.learning_rate(iteration))
        if gradient_norm is None or not math.isfinite(gradient_norm):
            self._skip(batch, iteration, step.losses, tokens.regular)
            return None
        self.skipped.in_a_row = 0
        self.meter.add(step.losses, tokens.regular, weights)
        self.alarms.note(step.losses, tokens.regular)
        return gradient_norm

    def start_saving(self) -> None:
        """Begin a checkpoint of this moment, which `saving` completes; see there for what may go wrong."""
        self.saving.start(self._state, self._description())

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless there is one; returns its step folder.

        Raises:
            SaveError: it could not be written.
        """
        self.whereabouts.enter("save")
        return self.saving.save(self._state, self._description())

    def load(self, folder: Path) -> None:
        """Continue from a step folder: parameters, optimizer state and progress.

        Raises:
            CheckpointError: the checkpoint is of another model.
            DamagedError: its shards are not what was saved; this trainer is of no use then.
        """
        saved = check_same_model(folder, self.description)
        model = trained_state(self.stage, self.mesh)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=True)
        wanted = {"model": model, "optimizer": optimizer}
        verifies = self.config.checkpoint.verify
        state = load_verified(folder, wanted, self.mesh) if verifies else load_checkpoint(folder, wanted)
        own = state.get("model", {})  # a stage may have nothing to train
        self.stage.load_sharded(own, is_whole=self.config.training.trains == "all")
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = saved.progress
        self.description = replace(self.description, initial=saved.initial)
        self.meter.load_state(state["meter"])
        self.skipped.load_state(state["skipped"])

    def end(self, status: int, reason: str) -> None:
        """Say how it went, in the log and in the attempt's outcome."""
        if self.attempt is None or not self.mesh.is_main:
            return
        log, iteration = logging.getLogger("megatron_ee"), self.progress.iteration
        if status == STOPPED:
            log.warning("%s: stopped after iteration %d; start the run again to go on", reason, iteration)
        try:
            self.attempt.end(status, reason, iteration=iteration)
        except OSError as error:
            log.error("the outcome of this attempt cannot be written: %s", error)

    def close(self) -> None:
        """End the loggers and leave the process groups."""
        self.whereabouts.enter("close")
        for logger in self.loggers:
            logger.close()
        if self.lock is not None:
            self.lock.release()
        close_mesh()

    def _state(self) -> dict:
        """What a checkpoint holds. Collective."""
        model = trained_state(self.stage, self.mesh)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model),
            "meter": self.meter.state(),
            "skipped": self.skipped.state(),
        }

    def _description(self) -> Description:
        return replace(self.description, progress=self.progress)

    def _do_what_is_due(self, iteration: int, gradient_norm: float | None) -> None:
        """Log, validate, and begin to save, each at its interval."""
        self.whereabouts.enter("log")
        if self._is_due(self.config.logging.interval):
            self._log_training(iteration, gradient_norm)
        if self.evaluator and self._is_due(self.config.training.eval_interval):
            self.whereabouts.enter("validation")
            self._log(self.evaluator.evaluate(self._weights(iteration), watches=[self.whereabouts]))
        if self._is_due(self.config.checkpoint.interval) and not self._is_diverging:
            with self.timer.phase("checkpoint"):
                self.start_saving()

    def _skip(self, batch: Batch, iteration: int, losses: Mapping[int, ExitLoss], num_tokens: float) -> None:
        """The optimizer has updated nothing. All ranks are here; losses that are no numbers stay out of the means."""
        of_batch = ExitMeter(self.meter.exits, self.mesh)
        of_batch.add(losses, num_tokens, measured := self._weights(iteration))
        means = of_batch.means()
        if all(map(math.isfinite, means.values())):
            self.meter.add(losses, num_tokens, measured)
        if self.optimizer.loss_scale > 1:
            self.skipped.count_overflow()
            return
        try:
            self.skipped.count_nonfinite(
                iteration + 1,
                batch,
                first_sample=self.progress.consumed_samples,
                losses=means,
                folder=self.attempt.folder if self.attempt else None,
            )
        except DivergedError:
            self.saving.settle()  # what was begun is from before
            raise

    @property
    def _is_diverging(self) -> bool:
        """Whether it may be the parameters that are no numbers any more; the last save is made in any case."""
        return self.skipped.in_a_row > 0 and self.progress.iteration < self.config.training.train_iters

    def _kept(self, iteration: int) -> list[KeptRows]:
        """The rows of this batch's micro-batches that run each of this stage's layers."""
        if self.layer_dropout is None:
            return []
        samples_MB = self.loader.sample_numbers(self.progress.consumed_samples)
        layers = [int(layer) for layer in self.stage.layers]
        return self.layer_dropout.kept(samples_MB, iteration, layers, self.mesh.device.torch)

    def _weights(self, iteration: int) -> Mapping[int, float]:
        return weights_at(self.config, iteration)

    def _is_due(self, interval: int) -> bool:
        """Every `interval` iterations (0: never), and at the end."""
        done = self.progress.iteration
        return done == self.config.training.train_iters or (interval > 0 and done % interval == 0)

    def _log_training(self, iteration: int, gradient_norm: float | None) -> None:
        progress, config = self.progress, self.config
        times = self.timer.read()
        self._log(
            {
                **self.meter.read("train", self._weights(iteration)),
                "train/lr": self.learning_rate(iteration),
                **({} if gradient_norm is None else {"train/grad_norm": gradient_norm}),
                **(self.layer_dropout.figures(iteration) if self.layer_dropout else {}),
                "train/skipped": self.skipped.since_record,
                "train/loss_scale": self.optimizer.loss_scale,
                "train/tokens": progress.consumed_samples * config.data.sequence_length,
                **self.throughput.figures(times.step_s, steps_left=config.training.train_iters - progress.iteration),
                **times.figures(),
                **self.alarms.compare(progress.iteration, times.busy_s, num_stages=self.mesh.pipeline_size),
                **peak_memory(self.mesh),
            }
        )
        self.skipped.since_record = 0

    def _log(self, figures: Figures) -> None:
        for logger in self.loggers:
            logger.log(self.progress.iteration, figures)
