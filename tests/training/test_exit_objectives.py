"""Every option of exits' losses, gates included, on real ranks: losses, every gradient, the norm and one optimizer step
equal those of one autograd over an independent model in one process (fp32)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers.one_step import assert_equals_reference, one_step
from helpers.ranks import RankPool
from helpers.tiny import VOCAB_SIZE, tiny_config

from megatron_ee.config import Config
from megatron_ee.errors import FieldError
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.pipeline.plan import Fill
from megatron_ee.training.exit_objectives import check_learners

SEQUENCE = {"tensor": 2, "sequence": True}
EQUAL_STAGES = {"pipeline": 2, "layout": [{"layers": 4}, {"layers": 4}]}
EXITS_LAST = {"pipeline": 2, "layout": [{"layers": 1}, {"layers": 7}]}
GATES: dict[str, Any] = {"gate": ["linear", "mlp"], "gate_loss": {"weight": 0.4, "false_exit_cost": 3.0}}
GATES_ON_FINAL = {**GATES, "gate_loss": {**GATES["gate_loss"], "target": "final"}}
WEIGHTED = {"token_weights": "max_probability"}
DISTILLED = {"distillation": {"weight": 0.6, "temperature": 2.0}}
HEATED = {"temperature": [0.5, 3.0]}
ALL = {**GATES_ON_FINAL, **WEIGHTED, **DISTILLED, **HEATED}
SEED_OF_SOME_LUCK = 3  # an untrained model is right once in 64 tokens


@dataclass(frozen=True)
class Case:
    name: str
    exits: dict[str, Any]
    parallel: dict[str, Any] = field(default_factory=dict)
    data: int = 1
    layers: tuple[int, int] = (2, 6)

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data

    def config(self, loss_chunk_rows: int = 5) -> Config:
        return tiny_config(
            seed=SEED_OF_SOME_LUCK,
            exits={"layers": list(self.layers), "loss_chunk_rows": loss_chunk_rows, **self.exits},
            parallel={"data": self.data, **self.parallel},
            training={"micro_batch_size": self.parallel.get("tensor", 1)},  # its ranks wait for each other in each
            optimizer={"epsilon": 1e-3},
        )


CASES = [
    Case("temperatures", HEATED),
    Case("token weights", WEIGHTED),
    Case("distillation", DISTILLED),
    Case("distillation, token weights, temperatures", {**DISTILLED, **WEIGHTED, **HEATED}),
    Case("gates", GATES),
    Case("gates on the final exit", GATES_ON_FINAL),
    Case("schedules of each exit's own", {"weight_schedule": [{"start": 0.3}, {"start": 2.0}]}),
    Case("all", ALL),
    Case("all, other heads", {**ALL, "head": ["mlp", "block"], "projection": ["own", "shared"]}),
    Case("all, split positions", ALL, SEQUENCE),
    Case("gates on both stages", {**GATES, **WEIGHTED, **HEATED}, EQUAL_STAGES),
    Case("all, two pipelines", ALL, data=2),
    Case("all, megatron-core's schedule", ALL, {**EXITS_LAST, "schedule": "megatron"}),
    Case("gates, zero bubble", GATES, {**EQUAL_STAGES, "schedule": "zero-bubble"}),
]
# Each of their halves is above, or with all the others.
SWEEP = [
    Case("all, two stages", ALL, EXITS_LAST),
    Case("gates, two ranks a matrix", GATES, {"tensor": 2}),
    Case("all, distributed optimizer", ALL, {"distributed_optimizer": True}, data=2),
    Case("all, exits just before their backward", {**ALL, "release": True}, EXITS_LAST),
    Case("token weights, two ranks a matrix", WEIGHTED, {"tensor": 2}),
    Case("distillation, two ranks a matrix", DISTILLED, {"tensor": 2}),
    Case("gates, split positions", GATES, SEQUENCE),
    Case("gates on both stages, split positions", {**GATES, **WEIGHTED}, {**SEQUENCE, **EQUAL_STAGES}),
    Case("gates, two pipelines of two stages", {**GATES, **WEIGHTED}, EQUAL_STAGES, data=2),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SWEEP)], ids=lambda case: case.name
)
def test_equals_one_autograd_over_the_whole_model(case: Case, ranks: RankPool) -> None:
    config = case.config()
    assert_equals_reference(config, ranks.run(case.world_size, one_step, config))


@pytest.mark.parametrize(
    "parallel",
    [{}, pytest.param({"tensor": 2}, marks=pytest.mark.slow), pytest.param(SEQUENCE, marks=pytest.mark.slow)],
    ids=["one rank", "TP", "SP"],
)
def test_all_logits_at_once_are_the_same(parallel: dict[str, Any], ranks: RankPool) -> None:
    case = Case("", ALL, parallel)
    assert_equals_reference(case.config(0), ranks.run(case.world_size, one_step, case.config(0)))


@pytest.mark.parametrize("kind", ["warmup", "cooldown"])
def test_fills_train_gates_as_they_train_exits(kind: str, ranks: RankPool) -> None:
    """Extra micro-batches count in the divisors, as everywhere; stage 0 has both exits and their gates."""
    stages = {"pipeline": 2, "layout": [{"layers": 6}, {"layers": 2}], "schedule": "filled-1f1b"}
    config = Case("", {**GATES, **WEIGHTED}, stages, layers=(2, 5)).config()
    fills = [Fill("warmup", 0)] if kind == "warmup" else [Fill("cooldown", 1)]
    assert_equals_reference(config, ranks.run(2, one_step, config, fills))


@pytest.mark.parametrize(
    "parallel", [{}, pytest.param(SEQUENCE, marks=pytest.mark.slow)], ids=["one rank", "split positions"]
)
def test_a_gate_changes_nothing_of_the_model(parallel: dict[str, Any], ranks: RankPool) -> None:
    """All gradients beside the gates' are those of a run without, bit for bit, and so are the norm and the step."""
    (plain, gated) = (
        ranks.run(parallel.get("tensor", 1), one_step, Case("", exits, parallel).config())
        for exits in ({}, {**GATES_ON_FINAL})
    )
    for without, having in zip(plain, gated, strict=True):
        assert having["gradient_norm"] == without["gradient_norm"] > 1.0, "clipped"
        for kind in ("gradients", "stepped"):
            added = having[kind].keys() - without[kind].keys()
            assert added and all(".gate." in name for name in added)
            for name, (_, pieces) in without[kind].items():
                for (_, ours), (_, theirs) in zip(having[kind][name][1], pieces, strict=True):
                    np.testing.assert_array_equal(ours, theirs, err_msg=name)
        for name, value in without["figures"].items():
            assert having["figures"][name] == value, name


@pytest.mark.parametrize(
    ("exits", "parallel", "field", "said"),
    [
        (
            DISTILLED,
            EQUAL_STAGES,
            "exits.distillation",
            "needs the final exit beside the one that learns from it, but exit 2 is on stage 0 and the final exit on "
            "stage 1",
        ),
        (
            GATES_ON_FINAL,
            EQUAL_STAGES,
            "exits.gate_loss.target",
            "exit 2 is on stage 0 and the final exit on stage 1",
        ),
        (
            DISTILLED,
            {"pipeline": 2, "chunks": 2, "schedule": "interleaved", "layout": [{"layers": 1}] * 3 + [{"layers": 5}]},
            "exits.distillation",
            "exit 2 is on stage 1, chunk 0 and the final exit on stage 1, chunk 1",
        ),
        (
            {**DISTILLED, "layers": [4, 6]},
            EQUAL_STAGES,
            "exits.distillation",
            "exit 4 is on stage 0 and the final exit on stage 1",
        ),
    ],
    ids=["distillation", "gates", "another chunk", "on the border"],
)
def test_what_learns_from_a_final_exit_elsewhere_is_refused(
    exits: dict[str, Any], parallel: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        tiny_config(exits={"layers": [2, 6], **exits}, parallel=parallel)
    assert field in str(caught.value)
    automatic = {name: value for name, value in parallel.items() if name != "layout"}
    config = tiny_config(exits={"layers": [2, 6], **exits}, parallel=automatic)
    with pytest.raises(FieldError, match="needs the final exit beside the one that learns from it") as refused:
        check_learners(config, layout_of(config, VOCAB_SIZE))
    assert refused.value.field == field


def test_on_the_right_side_of_a_border_an_exit_may_learn() -> None:
    stages = [{"layers": 4, "exits_at_end": False}, {"layers": 4, "exits_at_start": True}]
    exits = {"layers": [4, 6], **ALL}
    config = tiny_config(exits=exits, parallel={"pipeline": 2, "layout": stages})
    check_learners(config, layout_of(config, VOCAB_SIZE))
    ungated = {"layers": [2, 6], **GATES_ON_FINAL, "gate": ["none", "linear"]}
    check_learners(config := tiny_config(exits=ungated, parallel=EQUAL_STAGES), layout_of(config, VOCAB_SIZE))
