"""The runtime over real processes: it runs exactly its plan, and what travels arrives where it should."""

import time

import pytest
import torch
from helpers.ranks import RankPool

from megatron_ee.config import ParallelConfig
from megatron_ee.device import choose_device
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Action, Fill, Kind
from megatron_ee.parallel.pipeline.recorder import Recorder
from megatron_ee.parallel.pipeline.runtime import Runtime
from megatron_ee.parallel.pipeline.schedules import build_plan

NUM_MICROBATCHES = 6


class Counter:
    """F adds 1 to what it receives, B adds 1 to the gradient; a micro-batch starts at 10 x its number."""

    def __init__(self, stage: int, *, slow: bool = False) -> None:
        self.stage, self.slow = stage, slow
        self.outputs: dict[int, float] = {}
        self.gradients: dict[int, float] = {}
        self.weighed: list[int] = []

    def forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor:
        if self.slow:
            time.sleep(0.002 * (self.stage + 1))
        start = torch.full((1, 1, 1), 10.0 * action.microbatch) if received is None else received
        self.outputs[action.microbatch] = float(start) + 1
        return start + 1

    def exits(self, action: Action) -> None:
        assert action.microbatch in self.outputs

    def backward(self, action: Action, gradient: torch.Tensor | None) -> torch.Tensor | None:
        start = torch.full((1, 1, 1), 1000.0 + action.microbatch) if gradient is None else gradient
        self.gradients[action.microbatch] = float(start) + 1
        return None if self.stage == 0 else start + 1

    def weights(self, action: Action) -> None:
        assert action.microbatch in self.gradients
        self.weighed.append(action.microbatch)


def _run(
    num_stages: int, schedule: str, has_exits: list[bool], slow: bool = False, fills: tuple[Fill, ...] = ()
) -> tuple[list, dict, dict]:
    mesh = open_mesh(ParallelConfig(pipeline=num_stages), choose_device("cpu"))
    plan = build_plan(
        schedule, num_stages=num_stages, num_microbatches=NUM_MICROBATCHES, has_exits=has_exits, fills=fills
    )
    program = Counter(mesh.pipeline_rank, slow=slow)
    runtime = Runtime(mesh, MessageSpec((1, 1, 1), torch.float32, torch.device("cpu")))
    for _ in range(2):  # a runtime is used step after step
        recorder = Recorder(mesh.device)
        runtime.run(plan, program, watches=[recorder])
    spans = recorder.spans
    assert [span.action for span in spans] == list(plan.actions[mesh.pipeline_rank]), "exactly the plan"
    weighed = [span.action.microbatch for span in spans if span.action.kind is Kind.W]
    assert program.weighed == 2 * weighed
    assert weighed == (list(range(NUM_MICROBATCHES)) if schedule == "zero-bubble" else [])
    return spans, program.outputs, program.gradients


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble", "forward-only"])
def test_runs_the_plan_and_carries_the_values(ranks: RankPool, schedule: str, num_stages: int) -> None:
    results = ranks.run(num_stages, _run, num_stages, schedule, [True] * num_stages)
    for stage, (_, outputs, gradients) in enumerate(results):
        assert outputs == {m: 10.0 * m + stage + 1 for m in range(NUM_MICROBATCHES)}
        if schedule != "forward-only":
            assert gradients == {m: 1000.0 + m + num_stages - stage for m in range(NUM_MICROBATCHES)}


def test_fills_go_as_far_as_they_should(ranks: RankPool) -> None:
    """Values by number of micro-batch, as for regular ones; a gradient starts where a fill turns round."""
    fills = (Fill("warmup", 1), Fill("warmup", 1), Fill("warmup", 0), Fill("cooldown", 2), Fill("cooldown", 3))
    results = ranks.run(4, _run, 4, "filled-1f1b", [True] * 4, True, fills)
    everything = [(m, None) for m in range(NUM_MICROBATCHES)] + [*enumerate(fills, start=NUM_MICROBATCHES)]
    for stage, (_, outputs, gradients) in enumerate(results):
        reached = {m for m, fill in everything if not fill or fill.kind == "cooldown" or stage <= fill.stage}
        turns = {m: fill.stage if fill and fill.kind == "warmup" else 3 for m, fill in everything}
        trained = {m for m, fill in everything if not fill or fill.trains(stage)}
        assert outputs == {m: 10.0 * m + stage + 1 for m in reached}
        assert gradients == {m: 1000.0 + m + turns[m] + 1 - stage for m in trained}


@pytest.mark.parametrize("has_exits", [[True] * 4, [True, False, True, True]], ids=str)
def test_exits_run_after_the_send_and_before_the_gradient_is_awaited(ranks: RankPool, has_exits: list[bool]) -> None:
    results = ranks.run(4, _run, 4, "1f1b", has_exits, True)
    for stage, (spans, _, _) in enumerate(results[:-1]):
        when = {(span.action.kind, span.action.microbatch): span for span in spans}
        for microbatch in range(NUM_MICROBATCHES if has_exits[stage] else 0):
            sent, exits = when[Kind.SEND_FORWARD, microbatch], when[Kind.X, microbatch]
            awaited = when[Kind.RECV_BACKWARD, microbatch]
            assert sent.end <= exits.start
            assert exits.end <= awaited.start


def test_two_pipelines_do_not_mix(ranks: RankPool) -> None:
    results = ranks.run(4, _run, 2, "1f1b", [True, True])
    for rank, (_, outputs, _) in enumerate(results):
        assert outputs == {m: 10.0 * m + rank // 2 + 1 for m in range(NUM_MICROBATCHES)}
