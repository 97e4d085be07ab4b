"""W apart from B: the very numbers of 1F1B, in every precision; what leaves nothing behind; and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.one_step import one_step
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset
from helpers.tiny import SEQUENCE_LENGTH, VOCAB_SIZE, tiny_config

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.errors import FieldError
from megatron_ee.parallel.estimate import weight_products
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.mesh import open_mesh
from megatron_ee.parallel.pipeline.schedules import one_forward_one_backward, zero_bubble
from megatron_ee.plugins import PluginError
from megatron_ee.training.assemble import build_stage
from megatron_ee.training.planning import plan_step

ZERO_BUBBLE = {"pipeline": 2, "schedule": "zero-bubble"}


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        pytest.param("fp32", {}, marks=pytest.mark.slow),
        pytest.param("bf16", {"tensor": 2, "sequence": True}, marks=pytest.mark.slow),
        ("fp16", {}),
    ],
    ids=["fp32", "bf16, SP", "fp16"],
)
def test_a_run_is_that_of_1f1b_bit_for_bit(tmp_path: Path, ranks: RankPool, precision: str, more: dict) -> None:
    write_small_dataset(tmp_path)
    runs = []
    for schedule in ("1f1b", "zero-bubble"):
        parallel = {"pipeline": 2, "schedule": schedule, **more}
        config = run_config(tmp_path, name=schedule, parallel=parallel, training={"precision": precision})
        runs.append(ranks.run(2 * more.get("tensor", 1), train, config))
    for ours, theirs in zip(*runs, strict=True):
        assert ours["parameters"].keys() == theirs["parameters"].keys()
        for name, parameter in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], parameter, err_msg=name)


def test_all_sums_over_data_ranks_are_under_way_before_the_last_weights_end(ranks: RankPool) -> None:
    parallel = {**ZERO_BUBBLE, "data": 2, "overlap_grad_reduce": True}
    for result in ranks.run(4, one_step, tiny_config(parallel=parallel), None, 3):
        assert result["issued_while_running"] == result["num_buckets"] > 0


def _left_behind(config: Config) -> dict[str, Any]:
    """Bytes that the layers' backward leaves for W on the first stage, and what it leaves in other cases."""
    mesh = open_mesh(config.parallel, choose_device("cpu"))
    stage = build_stage(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, mesh)
    chunk, products = stage.chunks[0], stage.weight_products
    assert products is not None
    positions = torch.arange(SEQUENCE_LENGTH)
    shape = (SEQUENCE_LENGTH // (config.parallel.tensor if config.parallel.sequence else 1), 1, 32)

    def run(requires_grad: bool = True) -> list[Any]:
        x = torch.randn(shape, requires_grad=requires_grad)
        y, _ = stage.run_layers(x, positions, chunk.start, chunk.stop)
        if y.requires_grad:
            y.backward(torch.randn_like(y))
        return products.take()

    left = run()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for product in left
        for tensor in (product.x_SBI, product.gradient_SBO)
    }
    weights = {id(product.linear.weight) for product in left}
    without_gradient = [id(product.linear.weight) for product in run(requires_grad=False)]
    with torch.no_grad():
        evaluated = run()
    next(iter(stage.layers.values())).requires_grad_(False)
    thawed = run()
    stage.requires_grad_(False)
    return {
        "bytes": sum(storages.values()),
        "number": len(left),
        "the same weights": weights == set(without_gradient) and len(weights) == len(left),
        "evaluated": evaluated,
        "with one frozen layer": len(thawed),
        "frozen": run(),
        "grad": all(parameter.grad is None for product in left for parameter in [product.linear.weight]),
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("more", [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}], ids=["1", "TP", "SP"])
def test_what_is_left_behind(ranks: RankPool, more: dict[str, Any], recompute: str) -> None:
    layout = [{"layers": 4}, {"layers": 4}]
    config = tiny_config(parallel={**ZERO_BUBBLE, **more, "layout": layout}, training={"recompute": recompute})
    for left in ranks.run(2 * more.get("tensor", 1), _left_behind, config):
        assert left["number"] == 4 * 4, "of four matrices in four layers"
        expected = 4 * 4 * SEQUENCE_LENGTH * weight_products(config.parallel, config.model)
        assert left["bytes"] == pytest.approx(expected, rel=0.15)
        assert left["the same weights"], "also where only weights are trained"
        assert left["with one frozen layer"] == 3 * 4
        assert left["evaluated"] == left["frozen"] == []
        assert left["grad"], "B computes none of them"


def test_layers_of_transformer_engine_are_refused() -> None:
    config = tiny_config(parallel={**ZERO_BUBBLE, "layout": [{"layers": 4}, {"layers": 4}]})
    mesh: Any = SimpleNamespace(
        pipeline_rank=0, groups=None, device=SimpleNamespace(torch=torch.device("cpu"), has_transformer_engine=True)
    )
    with pytest.raises(FieldError, match=r"parallel\.schedule: zero-bubble needs megatron-core's own layers"):
        build_stage(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, mesh)


def test_a_plug_ins_schedule_has_no_weights_apart() -> None:
    config = tiny_config(plugins=["mine.py"], parallel={"pipeline": 2, "schedule": "mine"})
    layout = layout_of(config, VOCAB_SIZE)
    plan_step(config, layout, VOCAB_SIZE, 4, more_schedules={"mine": one_forward_one_backward})
    with pytest.raises(PluginError, match="'mine' has W, for which only zero-bubble builds layers"):
        plan_step(config, layout, VOCAB_SIZE, 4, more_schedules={"mine": zero_bubble})
