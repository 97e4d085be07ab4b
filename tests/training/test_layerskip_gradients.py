"""Layer dropout and the exits' curriculum on real ranks: losses, gradients, their norm and the updated parameters are
those of an independent model that runs the samples one by one, each without the layers that it skips (fp32)."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import helpers.one_step
import numpy as np
import pytest
from helpers.one_step import assert_equals_reference, one_step, reference_step, skipped_layers
from helpers.ranks import RankPool
from helpers.shards import whole
from helpers.tiny import tiny_config

from megatron_ee.config import Config
from megatron_ee.parallel.pipeline.plan import Fill
from megatron_ee.training import gradients

_ZERO_BUBBLE = {"pipeline": 2, "schedule": "zero-bubble"}
_CHUNKS = {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}
_OVERLAP = {"overlap_grad_reduce": True}
_SEQUENCE = {"tensor": 2, "sequence": True}
_DROPOUT = {"maximum": 0.6, "shape": "sqrt"}


@dataclass(frozen=True)
class Case:
    """The whole recipe, on `data` pipelines of equal stages. Samples come two to a micro-batch: of some micro-batches
    one runs a layer, of others none."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    data: int = 1
    exits: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    iteration: int = 3
    repeats: int = 1
    fills: tuple[Fill, ...] | None = None

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data

    def config(self) -> Config:
        parts = self.parallel.get("pipeline", 1) * self.parallel.get("chunks", 1)
        exits = {
            "layers": "all",
            "norm": "shared",
            "layerskip": {"scale": 1.0, "curriculum": "rotational", "rotation": 3},
            "loss_chunk_rows": 5,
            "weight_schedule": {},
        }
        return tiny_config(
            exits={**exits, **self.exits},
            parallel={"layout": [{"layers": 8 // parts}] * parts, "data": self.data, **self.parallel},
            model=self.model,
            training={"micro_batch_size": 2, "layer_dropout": _DROPOUT, **self.training},
            optimizer={"epsilon": 1e-3},
        )


CASES = [
    Case("one process"),
    Case("one process, tied", model={"tie_embeddings": True}),
    Case("four stages", {"pipeline": 4}, iteration=4),
    Case("all logits at once", {"pipeline": 2}, exits={"loss_chunk_rows": 0}),
    Case("full recomputation, SP", _SEQUENCE, training={"recompute": "full"}),
    Case("selective recomputation", training={"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    Case("two chunks", _CHUNKS),
    Case("exits just before their backward", {"pipeline": 2}, exits={"release": True}),
    Case("zero bubble", _ZERO_BUBBLE),
    Case(
        "filled, turning where no exit has a loss",
        {"pipeline": 4, "schedule": "filled-1f1b"},
        exits={"layers": [2, 3, 6], "layerskip": {"scale": 1.0, "curriculum": "rotational", "rotation": 6}},
        fills=(Fill("warmup", 1), Fill("warmup", 0), Fill("cooldown", 2)),
        iteration=1,
    ),
    Case("gradual, the first iteration", {"pipeline": 2}, exits={"layerskip": {"curriculum": "gradual"}}, iteration=0),
    Case("gradual, half-way to all", {"pipeline": 2}, exits={"layerskip": {"curriculum": "gradual"}}, iteration=2),
    Case("no curriculum", {"pipeline": 2}, exits={"layerskip": {"curriculum": "none"}}),
    Case(
        "dropout with other heads",
        {"pipeline": 2},
        exits={"layers": [2, 4, 6], "head": ["mlp", "block", "mlp"], "norm": "own", "layerskip": None},
    ),
    Case(
        "samples that skip nearly all",
        {"pipeline": 2},
        training={"layer_dropout": {"maximum": 0.97, "shape": "uniform"}},
    ),
    Case("dropout that grows", training={"layer_dropout": {**_DROPOUT, "curriculum": "exponential"}}, iteration=5),
    Case("overlap, tied", _OVERLAP, data=2, repeats=3, model={"tie_embeddings": True}),
    Case(
        "overlap, distributed optimizer, chunks",
        {**_CHUNKS, **_OVERLAP, "distributed_optimizer": True},
        data=2,
        repeats=3,
    ),
    Case("overlap, megatron", {"schedule": "megatron", "pipeline": 2, **_OVERLAP}, data=2, repeats=3),
]
# What each of them joins is above, one with another.
SWEEP = [
    Case("two stages", {"pipeline": 2}),
    Case("sequence parallel", _SEQUENCE),
    Case("two data ranks", data=2),
    Case("gpipe", {"pipeline": 2, "schedule": "gpipe"}),
    Case("filled", {"pipeline": 2, "schedule": "filled-1f1b"}, fills=(Fill("warmup", 0), Fill("cooldown", 1))),
    Case("dropout with other exits", {"pipeline": 2}, exits={"layers": [2, 5], "norm": "own", "layerskip": None}),
    Case("megatron", {"pipeline": 2, "schedule": "megatron"}),
    Case("overlap", _OVERLAP, data=2, repeats=3),
    Case("overlap, zero bubble", {**_ZERO_BUBBLE, **_OVERLAP}, data=2, repeats=3),
    Case("one process, own norms", exits={"norm": "own"}),
    Case("two stages, tied", {"pipeline": 2}, model={"tie_embeddings": True}),
    Case("tensor parallel", {"tensor": 2}),
    Case("sequence and pipeline", {**_SEQUENCE, "pipeline": 2}),
    Case("two data ranks of one sample", data=2, training={"micro_batch_size": 1}),
    Case("full recomputation", {"pipeline": 2}, training={"recompute": "full"}),
    Case("zero bubble, full recomputation, SP", {**_ZERO_BUBBLE, **_SEQUENCE}, training={"recompute": "full"}),
    Case("megatron, two chunks", {"pipeline": 2, "chunks": 2, "schedule": "megatron"}),
    Case(
        "samples that skip nearly all, megatron",
        {"pipeline": 2, "schedule": "megatron"},
        training={"layer_dropout": {"maximum": 0.97, "shape": "uniform"}},
    ),
    Case("distributed optimizer", {"pipeline": 2, "distributed_optimizer": True}, data=2),
    Case("overlap, one sample", _OVERLAP, data=2, repeats=3, training={"micro_batch_size": 1}),
    Case("overlap, stages", {"pipeline": 2, **_OVERLAP}, data=2, repeats=3),
    Case("overlap, distributed optimizer", {**_OVERLAP, "distributed_optimizer": True}, data=2, repeats=3),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SWEEP)], ids=lambda case: case.name
)
def test_equals_a_loop_over_samples(case: Case, ranks: RankPool) -> None:
    config = case.config()
    results = ranks.run(case.world_size, one_step, config, case.fills, case.repeats, None, None, case.iteration)
    assert_equals_reference(config, results, case.iteration)


def _with_small_buckets(config: Config, iteration: int, repeats: int) -> dict[str, Any]:
    """As `one_step`, with many buckets, as large models have, and on the order in which their sums begin."""
    original = gradients.DistributedDataParallelConfig
    gradients.DistributedDataParallelConfig = partial(original, bucket_size=2000)  # type: ignore[misc]
    try:
        return one_step(config, repeats=repeats, iteration=iteration)
    finally:
        gradients.DistributedDataParallelConfig = original  # type: ignore[misc]


@pytest.mark.parametrize("iteration", [3, *(pytest.param(later, marks=pytest.mark.slow) for later in (4, 5))])
@pytest.mark.parametrize(
    ("parallel", "fewest"),
    [
        pytest.param({}, 0.8, marks=pytest.mark.slow),
        pytest.param({"distributed_optimizer": True}, 0.8, marks=pytest.mark.slow),
        ({**_ZERO_BUBBLE, "distributed_optimizer": True}, 0.5),
    ],
    ids=["1f1b", "distributed optimizer", "zero bubble"],
)
def test_sums_of_many_buckets_begin_in_one_order_while_gradients_are_computed(
    ranks: RankPool, parallel: dict[str, Any], fewest: float, iteration: int
) -> None:
    """Data ranks skip other layers in their last backward: in other orders, their sums would be of other buckets."""
    exits = {"layerskip": {"scale": 1.0, "curriculum": "rotational", "rotation": 3}}
    case = Case("", {**parallel, **_OVERLAP}, data=2, training={"micro_batch_size": 1}, exits=exits)
    config = case.config()
    results = ranks.run(case.world_size, _with_small_buckets, config, iteration, 3)
    last = [skipped_layers(config, sample, iteration) for sample in (6, 7)]
    assert last[0] != last[1], "the case shows nothing"
    assert_equals_reference(config, results, iteration)
    assert results[0]["num_buckets"] > 8
    assert results[0]["issued_while_running"] >= fewest * results[0]["num_buckets"]


def test_megatron_cores_own_counts_would_not_do(ranks: RankPool) -> None:
    """What the cases above are spared."""
    config = Case("", _OVERLAP, training={"micro_batch_size": 1}).config()
    (said,) = ranks.run(1, _as_though_nothing_varied, config)
    assert said is not None


def _as_though_nothing_varied(config: Config) -> str | None:
    original = helpers.one_step.gradients_vary
    helpers.one_step.gradients_vary = lambda _: False
    try:
        one_step(config, repeats=3, iteration=3)
    except AssertionError as error:
        return f"AssertionError: {error}"
    finally:
        helpers.one_step.gradients_vary = original
    return None


def test_skipping_is_seen_by_the_oracle(ranks: RankPool) -> None:
    """Once with the draws of another iteration's probabilities, and once with another seed's."""
    config = Case("").config()
    results = ranks.run(1, one_step, config, None, 1, None, None, 3)
    parameters = whole(result["parameters"] for result in results)
    measured = whole(result["gradients"] for result in results)
    _, gradients_of_other_draws = reference_step(
        config.model_copy(update={"seed": 1}), parameters, results[0]["layout"], (), 3
    )
    worst = max(float(np.abs(measured[name] - other).max()) for name, other in gradients_of_other_draws.items())
    assert worst > 1e-2


@pytest.mark.slow
def test_copies_of_the_shared_norm_stay_equal(ranks: RankPool) -> None:
    """`whole` compares what several ranks hold under one name; here are four that hold the norm."""
    config = Case("", {"pipeline": 4}).config()
    results = ranks.run(4, one_step, config, None, 1, None, None, 3)
    for when in ("parameters", "gradients", "stepped"):
        assert all("norm.weight" in result[when] for result in results)
        whole(result[when] for result in results)
    assert not np.array_equal(whole(r["stepped"] for r in results)["norm.weight"], np.ones(32, dtype=np.float32))
