"""Where only exits are trained: layers up to the last exit, by the cost of their forward, and stages left idle."""

from dataclasses import replace
from typing import Any

import pytest
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import Config
from megatron_ee.parallel.chunks import Chunk
from megatron_ee.parallel.costs import costs_of
from megatron_ee.parallel.estimate import describe, estimate
from megatron_ee.parallel.layout import describe_layout, layout_of
from megatron_ee.parallel.pipeline.plan import Action, Kind
from megatron_ee.parallel.pipeline.simulate import InvalidPlanError, check, simulate
from megatron_ee.training.planning import plan_step

IDLE = {"pipeline": 3, "layout": [{"layers": 2}, {"layers": 3}, {"layers": 0}]}


def _tuning(**changes: Any) -> Config:
    tuning = {"training": {"trains": "exits"}, "checkpoint": {"initial": "x"}, "exits": {"layers": [2, 5]}}
    return tiny_config(**{**tuning, **changes})


def test_the_last_exit_is_the_end_and_heads_weigh_against_forwards() -> None:
    assert layout_of(_tuning(), VOCAB_SIZE) == ((Chunk(0, 5, (2, 5)),),)
    # a head of 2,048 multiply-adds a token, forward and backward, is less than the forward of one of these layers
    (first,), (second,) = layout_of(_tuning(parallel={"pipeline": 2}), VOCAB_SIZE)
    assert (first.start, first.stop, second.start, second.stop) == (0, 3, 3, 5)
    # at 64 times the vocabulary, heads outweigh layers: one for each stage
    (first,), (second,) = layout_of(_tuning(parallel={"pipeline": 2}), 64 * VOCAB_SIZE)
    assert (first.exits, second.exits) == ((2,), (5,))


def test_costs_have_no_backward_of_layers() -> None:
    costs, of_training = costs_of(_tuning(), VOCAB_SIZE), costs_of(tiny_config(), VOCAB_SIZE)
    assert costs == replace(of_training, layer_backward=0.0)


def test_an_idle_stage_has_no_actions_and_no_messages() -> None:
    config = _tuning(parallel=IDLE)
    layout = layout_of(config, VOCAB_SIZE)
    assert layout[2] == (Chunk(5, 5, ()),)
    plan = plan_step(config, layout, VOCAB_SIZE, 4)
    check(plan)
    assert (plan.num_stages, plan.num_idle, plan.actions[2]) == (3, 1, ())
    kinds = [{action.kind for action in actions} for actions in plan.actions]
    assert kinds == [{Kind.F, Kind.X, Kind.SEND_FORWARD}, {Kind.RECV_FORWARD, Kind.F, Kind.X}, set()]
    assert simulate(plan, lambda action: 1.0).busy == (8.0, 8.0, 0.0)
    assert describe_layout(layout, config.exits, costs_of(config, VOCAB_SIZE))[2] == "stage 2: idle"


def test_work_on_an_idle_stage_is_invalid() -> None:
    config = _tuning(parallel=IDLE)
    plan = plan_step(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, 2)
    with pytest.raises(InvalidPlanError, match="which is idle"):
        check(replace(plan, actions=(*plan.actions[:2], (Action(Kind.F, 2, 0, 0),))))


def test_estimate_counts_what_is_trained() -> None:
    config = _tuning(parallel=IDLE, exits={"layers": [2, 5], "projection": ["shared", "own"]})
    estimated = estimate(config, 3, VOCAB_SIZE)
    own = VOCAB_SIZE * 32
    assert estimated.trained == 2 * 32 + own
    assert estimated.checkpoint == 12 * estimated.trained
    first, second, idle = estimated.stages
    assert (first.gradients, second.gradients) == (4 * 32, 4 * (32 + own))
    assert (idle.parameters, idle.total) == (0, 0)
    assert f"{estimated.trained:,} of them trained" in describe(estimated)
