"""What each rank of the pipeline bench does: forwards and backwards of training steps, timed or recorded.

Import this after the device is chosen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from bench_pipeline_sizes import ModelSizes, SleepingSizes
from bench_report import Rounds, take_turns

from megatron_ee.config import Config, ParallelConfig
from megatron_ee.data.batch import Batch
from megatron_ee.device import choose_device
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.chunks import Layout, have_exits
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import Mesh, open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.fill_planner import plan_fills
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind, Plan
from megatron_ee.parallel.pipeline.recorder import Recorder
from megatron_ee.parallel.pipeline.runtime import Runtime, StageProgram
from megatron_ee.parallel.pipeline.schedules import Pipeline, build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts
from megatron_ee.parallel.pipeline.timeline import Span
from megatron_ee.training.assemble import build_stage, message_between_stages
from megatron_ee.training.gradients import StageGradients
from megatron_ee.training.loss_weights import loss_weights
from megatron_ee.training.losses import count_tokens
from megatron_ee.training.stage_step import StageStep


@dataclass(frozen=True, slots=True)
class Replays:
    """The same step several times: this rank's spans of each, over one clock of all ranks of a machine."""

    plan: Plan
    steps: list[list[Span]]


@dataclass(frozen=True, slots=True)
class Timed:
    """What a rank found out.

    Attributes:
        exits: seconds of steps without (A) and with (B) early exits; the same on each rank.
        fills: without (A) and with (B) fills; None: not measured.
        replays: by schedule.
        plan_without: of A of `exits`.
    """

    exits: Rounds
    fills: Rounds | None
    replays: dict[str, Replays]
    plan_without: Plan


class Step:
    """A plan that can be run again and again."""

    def __init__(self, mesh: Mesh, message: MessageSpec, plan: Plan, program: Callable[[], StageProgram]) -> None:
        self._mesh, self._program = mesh, program
        self._runtime = Runtime(mesh, message)
        self.plan = plan

    def seconds(self) -> float:
        """From the first rank's start to the last one's end; the same on each rank."""
        program = self._program()
        self._mesh.barrier()
        started = time.perf_counter()
        self._runtime.run(self.plan, program)
        ends = torch.tensor([-started, time.perf_counter()], dtype=torch.float64)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return float(ends.sum())

    def replays(self, number: int) -> Replays:
        """Recorded, after one that is dropped."""
        steps: list[list[Span]] = []
        for _ in range(number + 1):
            recorder = Recorder(self._mesh.device)
            program = self._program()
            self._mesh.barrier()
            self._runtime.run(self.plan, program, watches=[recorder])
            steps.append(recorder.spans)
        return Replays(self.plan, steps[1:])


def model_steps(sizes: ModelSizes) -> Timed:
    """Of a real model on two stages."""
    mesh = open_mesh(ParallelConfig(pipeline=2, chunks=2), choose_device("cpu"))
    without, having = ModelStage(sizes, mesh, early_exits=False), ModelStage(sizes, mesh)
    a, b = without.step("1f1b"), having.step("1f1b")
    exits = take_turns(sizes.rounds, a.seconds, b.seconds)
    steps = {
        "gpipe": having.step("gpipe"),
        "1f1b": b,
        "release": having.step("1f1b", release_exits=True),
        "filled-1f1b": having.step("filled-1f1b", (Fill("warmup", 0), Fill("cooldown", 1))),
        "interleaved": ModelStage(sizes, mesh, schedule="interleaved").step("interleaved"),
        "zero-bubble": ModelStage(sizes, mesh, schedule="zero-bubble").step("zero-bubble"),
    }
    return Timed(exits, None, {name: step.replays(sizes.replays) for name, step in steps.items()}, a.plan)


def sleeping_steps(sizes: SleepingSizes) -> Timed:
    """Of stages that sleep for as long as they would work."""
    stages = sizes.num_stages
    mesh = open_mesh(ParallelConfig(pipeline=stages, chunks=2), choose_device("cpu"))
    message = MessageSpec((1, 1, 1), torch.float32, mesh.device.torch)
    everywhere, nowhere = [True] * stages, [False] * (stages - 1) + [True]

    def step(schedule: str, has_exits: Sequence[bool], chunks: int = 1, **more: object) -> Step:
        plan = build_plan(
            schedule,
            num_stages=stages,
            num_microbatches=sizes.num_microbatches,
            has_exits=[*has_exits] * chunks,
            num_chunks=chunks,
            **more,  # type: ignore[arg-type]
        )
        sleeper = Sleeper(sizes.costs if schedule != "zero-bubble" else halved_backward(sizes.costs), chunks)
        return Step(mesh, message, plan, lambda: sleeper)

    pipeline = Pipeline(stages, sizes.num_microbatches, tuple(everywhere))
    fills = plan_fills(pipeline, sizes.costs)
    without, having = step("1f1b", nowhere), step("1f1b", everywhere)
    filled = step("filled-1f1b", everywhere, fills=fills)
    steps = {
        "gpipe": step("gpipe", everywhere),
        "1f1b": having,
        "release": step("1f1b", everywhere, release_exits=True),
        "filled-1f1b": filled,
        "interleaved": step("interleaved", everywhere, chunks=2),
        "zero-bubble": step("zero-bubble", everywhere),
    }
    return Timed(
        exits=take_turns(sizes.rounds, without.seconds, having.seconds),
        fills=take_turns(sizes.rounds, having.seconds, filled.seconds),
        replays={name: step.replays(sizes.replays) for name, step in steps.items()},
        plan_without=without.plan,
    )


class ModelStage:
    """One stage of a model with random parameters, its exit, and what its steps need."""

    def __init__(self, sizes: ModelSizes, mesh: Mesh, *, early_exits: bool = True, schedule: str = "1f1b") -> None:
        self._config = config = model_config(sizes, early_exits=early_exits, schedule=schedule)
        self._mesh, self._vocab_size = mesh, sizes.vocab_size
        self._layout: Layout = layout_of(config, sizes.vocab_size)
        self._stage: Stage = build_stage(config, self._layout, sizes.vocab_size, mesh)
        self._gradients = StageGradients(self._stage, mesh, config.parallel)
        self._num_microbatches = sizes.num_microbatches

    def step(self, schedule: str, fills: tuple[Fill, ...] = (), *, release_exits: bool = False) -> Step:
        config, layout = self._config, self._layout
        plan = build_plan(
            schedule,
            num_stages=len(layout),
            num_chunks=len(layout[0]),
            num_microbatches=self._num_microbatches,
            has_exits=have_exits(layout),
            fills=fills,
            release_exits=release_exits,
        )
        batch = self._batch(plan.num_microbatches)
        tokens = count_tokens(batch, plan, self._mesh)
        weights = loss_weights(config.exits, config.model.num_layers, 0)
        exits, no_sync = config.exits, self._gradients.no_sync

        def program() -> StageStep:
            self._gradients.zero()
            return StageStep(self._stage, batch, plan, tokens, weights, exits=exits, no_sync=no_sync)

        return Step(self._mesh, message_between_stages(config, self._mesh.device), plan, program)

    def _batch(self, num_microbatches: int) -> Batch:
        """Random tokens, the same on each rank."""
        shape = (num_microbatches, 1, self._config.data.sequence_length + 1)
        tokens_MBS = torch.randint(self._vocab_size, shape, generator=torch.Generator().manual_seed(0))
        return Batch(tokens_MBS[..., :-1], tokens_MBS[..., 1:], torch.ones(num_microbatches, 1, shape[2] - 1))


class Sleeper:
    """A stage of one chunk or several, which share its durations evenly."""

    def __init__(self, costs: StageCosts, chunks: int) -> None:
        self._costs, self._chunks = costs, chunks
        self._message = torch.zeros(1, 1, 1)

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        return self._sleep(action)

    def exits(self, action: Action) -> None:
        assert action.kind is Kind.X
        self._sleep(action)

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        return self._sleep(action)

    def weights(self, action: Action) -> None:
        self._sleep(action)

    def _sleep(self, action: Action) -> torch.Tensor:
        time.sleep(self._costs(action) / self._chunks)
        return self._message


def halved_backward(costs: StageCosts) -> StageCosts:
    """The same durations with half of each backward in W."""
    halves = tuple(duration / 2 for duration in costs.backward)
    return replace(costs, backward=halves, weight=halves)


def model_config(sizes: ModelSizes, *, early_exits: bool = True, schedule: str = "1f1b") -> Config:
    """Two stages, whose layers are given, interleaved with two chunks; the early exit is at the end of the first."""
    interleaved = schedule == "interleaved"
    layers = sizes.chunk_layers if interleaved else sizes.stage_layers
    return Config.model_validate(
        {
            "name": "bench",
            "model": {
                "num_layers": sum(sizes.stage_layers),
                "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "vocab_size": sizes.vocab_size,
            },
            "exits": {
                "layers": sizes.stage_layers[:1] if early_exits else [],
                "weight_schedule": {"shape": "constant"},
            },
            "parallel": {
                "pipeline": 2,
                "chunks": 1 + interleaved,
                "schedule": schedule,
                "layout": [{"layers": number} for number in layers],
            },
            "data": {"sequence_length": sizes.sequence_length},
            "training": {
                "train_iters": 1,
                "global_batch_size": sizes.num_microbatches,
                "micro_batch_size": 1,
                "eval_iters": 0,
            },
        }
    )
