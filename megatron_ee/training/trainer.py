"""The training loop."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_ee.checkpoint.description import Description, Progress
from megatron_ee.checkpoint.sharded import check_same_model, load_checkpoint, model_state
from megatron_ee.config import Config
from megatron_ee.data.batch import Batch
from megatron_ee.data.loader import BatchLoader
from megatron_ee.errors import UserError
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.mesh import Mesh, close_mesh
from megatron_ee.parallel.pipeline.plan import Plan
from megatron_ee.parallel.pipeline.runtime import ActionWatch, Runtime
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.training.evaluate import Evaluator
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loggers import Figures, Logger
from megatron_ee.training.loss_weights import loss_weights
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.lr_schedule import LearningRate
from megatron_ee.training.megatron_runtime import MegatronRuntime
from megatron_ee.training.observation.metrics import ExitMeter
from megatron_ee.training.observation.throughput import Throughput, peak_memory
from megatron_ee.training.observation.tracer import Tracer
from megatron_ee.training.operations.attempts import STOPPED, Attempt
from megatron_ee.training.operations.saving import Saving
from megatron_ee.training.operations.stopping import REASONS, StopRequests
from megatron_ee.training.optimizers import OptimizerBackend
from megatron_ee.training.stage_step import StageStep


class DivergedError(UserError):
    """The loss or its gradient is no number any more. All ranks see it in the same step."""


@dataclass
class Trainer:
    """Everything one rank needs to train its stage; `build_trainer` puts it together.

    All ranks call the same methods in the same order. Only the main rank has loggers and an attempt.
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
    throughput: Throughput
    tracer: Tracer
    evaluator: Evaluator | None
    saving: Saving
    progress: Progress = Progress(0, 0)
    num_skipped: int = 0  # steps since the last record whose gradients overflowed
    loggers: Sequence[Logger] = ()
    stop_requests: StopRequests = field(default_factory=StopRequests)
    attempt: Attempt | None = None

    def train(self, until: int | None = None) -> str:
        """Run iterations up to `until` (default: all), logging, validating and saving on the way.

        Returns:
            Why it stopped early, with a checkpoint of where it was: one of REASONS, and "" where it did not.

        Raises:
            SaveError: the checkpoint of where it ended or stopped could not be written.
        """
        training = self.config.training
        stop = training.train_iters if until is None else min(until, training.train_iters)
        start = self.progress.iteration
        while (iteration := self.progress.iteration) < stop:
            stops, is_writing = self.mesh.maxima_over_ranks(self.stop_requests.reason(), self.saving.is_writing())
            if self.saving.is_pending and not is_writing:
                with self.throughput.phase("checkpoint"):
                    self.saving.settle()
            if reason := REASONS[stops]:
                if iteration > start:
                    self.save()
                return reason
            with self.throughput.step():
                with self.throughput.phase("data"):
                    batch = self.loader.batch(self.progress.consumed_samples)
                with self.tracer.step(iteration + 1) as watches:
                    gradient_norm = self.train_step(batch, iteration, watches=watches)
            try:
                self._check(gradient_norm, iteration)
            except DivergedError:
                self.saving.settle()  # what was begun is from before
                raise
            consumed = self.progress.consumed_samples + self.loader.samples_per_batch
            self.progress = Progress(iteration + 1, consumed)
            if self._is_due(self.config.logging.interval):
                self._log_training(iteration, gradient_norm)
            if self.evaluator and self._is_due(training.eval_interval):
                self._log(self.evaluator.evaluate(self._weights(iteration)))
            if self._is_due(self.config.checkpoint.interval):
                with self.throughput.phase("checkpoint"):
                    self.start_saving()
        self.saving.settle()
        if self.progress.iteration == training.train_iters:
            self.save()  # once more, if that has failed
        return ""

    def train_step(self, batch: Batch, iteration: int, *, watches: Sequence[ActionWatch] = ()) -> float | None:
        """One optimizer step on one global batch; returns the gradient norm, or None where the step was skipped."""
        tokens = count_tokens(batch, self.plan, self.mesh)
        loss_scale = self.optimizer.loss_scale
        step = StageStep(
            self.stage,
            batch,
            self.plan,
            tokens,
            {layer: weight * loss_scale for layer, weight in self._weights(iteration).items()},
            chunk_rows=self.config.exits.loss_chunk_rows,
            no_sync=self.gradients.no_sync,
        )
        self.gradients.zero()
        with self.throughput.phase("forward_backward"):
            self.runtime.run(self.plan, step, watches=watches)
        with self.throughput.phase("grad_sync"):
            self.gradients.reduce(tokens.gradient_factor)
        with self.throughput.phase("optimizer"):
            gradient_norm = self.optimizer.step(self.learning_rate(iteration))
        self.meter.add(step.losses, tokens.regular)
        return gradient_norm

    def start_saving(self) -> None:
        """Begin a checkpoint of this moment, which `saving` completes; see there for what may go wrong."""
        self.saving.start(self._state, self._description())

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless there is one; returns its step folder.

        Raises:
            SaveError: it could not be written.
        """
        return self.saving.save(self._state, self._description())

    def load(self, folder: Path) -> None:
        """Continue from a step folder: parameters, optimizer state and progress.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        saved = check_same_model(folder, self.description)
        model = model_state(self.stage, self.mesh)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=True)
        state = load_checkpoint(folder, {"model": model, "optimizer": optimizer})
        self.stage.load_sharded(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = saved.progress
        self.meter.load_state(state["meter"])
        self.num_skipped = state["meter"]["num_skipped"]

    def end(self, status: int, reason: str) -> None:
        """Say how it went, in the log and in the attempt's outcome."""
        if self.attempt is None:
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
        for logger in self.loggers:
            logger.close()
        close_mesh()

    def _state(self) -> dict:
        """What a checkpoint holds. Collective."""
        model = model_state(self.stage, self.mesh)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model),
            "meter": {**self.meter.state(), "num_skipped": self.num_skipped},
        }

    def _description(self) -> Description:
        return replace(self.description, progress=self.progress)

    def _check(self, gradient_norm: float | None, iteration: int) -> None:
        if gradient_norm is None and self.optimizer.loss_scale > 1:
            self.num_skipped += 1
        elif gradient_norm is None or not math.isfinite(gradient_norm):
            norm = gradient_norm if gradient_norm is not None else "no number at any loss scale"
            raise DivergedError(
                f"iteration {iteration + 1}: the norm of the gradients is {norm}; training stops here, and nothing of "
                f"this step is saved. Resume from an earlier checkpoint, with a lower optimizer.lr say"
            )

    def _weights(self, iteration: int) -> Mapping[int, float]:
        return loss_weights(self.config.exits, self.config.model.num_layers, iteration)

    def _is_due(self, interval: int) -> bool:
        """Every `interval` iterations (0: never), and at the end."""
        done = self.progress.iteration
        return done == self.config.training.train_iters or (interval > 0 and done % interval == 0)

    def _log_training(self, iteration: int, gradient_norm: float | None) -> None:
        progress, config = self.progress, self.config
        self._log(
            {
                **self.meter.read("train", self._weights(iteration)),
                "train/lr": self.learning_rate(iteration),
                **({} if gradient_norm is None else {"train/grad_norm": gradient_norm}),
                "train/skipped": self.num_skipped,
                "train/loss_scale": self.optimizer.loss_scale,
                "train/tokens": progress.consumed_samples * config.data.sequence_length,
                **self.throughput.read(steps_left=config.training.train_iters - progress.iteration),
                **peak_memory(self.mesh),
            }
        )

        self.num_skipped = 0

    def _log(self, figures: Figures) -> None:
        for logger in self.loggers:
            logger.log(self.progress.iteration, figures)
