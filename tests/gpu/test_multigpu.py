"""Steps in every kind of layout equal one GPU's, over NCCL; and over gloo, in a few layouts, to prove the test.

tests/training/test_gradients.py has the whole table of layouts and exits on the CPU. What it lacks, and why:
  recomputation of layernorm        needs Transformer Engine's layers: megatron-core 0.16.1 asks for them
  overlap of sums and compute       gloo sums in a thread; that they run at once shows in a GPU's trace alone
  overlap of interleaved messages   megatron-core's own, on streams
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gpu import cases
from gpu.conftest import Place
from gpu.runs import assert_same_first_step, first_step_config
from helpers.runs import write_small_dataset

Steps = dict[int, dict[str, float]]
"""Figures by iteration."""


class Layout(NamedTuple):
    """How a run is split."""

    name: str
    parallel: dict[str, Any]
    data: int = 1
    training: dict[str, Any] = {}  # noqa: RUF012
    is_filled: bool = False  # its gradient is of more samples

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data


_CHUNKS = {"chunks": 2, "schedule": "interleaved"}
_OVERLAP = {"overlap_grad_reduce": True}
_SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
LAYOUTS = [
    Layout("two stages", {"pipeline": 2}),
    Layout("two stages, gpipe", {"pipeline": 2, "schedule": "gpipe"}),
    Layout("four stages", {"pipeline": 4}),
    Layout("tensor parallel", {"tensor": 2}),
    Layout("sequence parallel", {"tensor": 2, "sequence": True}),
    Layout("data parallel", {}, data=2),
    Layout("tensor and pipeline", {"tensor": 2, "pipeline": 2}),
    Layout("two pipelines", {"pipeline": 2}, data=2),
    Layout("two chunks", {"pipeline": 2, **_CHUNKS}),
    Layout("two chunks, sequence parallel", {"tensor": 2, "sequence": True, "pipeline": 2, **_CHUNKS}),
    Layout("four stages of two chunks", {"pipeline": 4, **_CHUNKS}),
    Layout("filled, two stages", {"pipeline": 2, "schedule": "filled-1f1b"}, is_filled=True),
    Layout("filled, four stages", {"pipeline": 4, "schedule": "filled-1f1b"}, is_filled=True),
    Layout("megatron", {"pipeline": 2, "schedule": "megatron"}),
    Layout("megatron, two chunks", {"pipeline": 2, "chunks": 2, "schedule": "megatron"}),
    Layout("overlap", {"pipeline": 2, "overlap_grad_reduce": True}, data=2),
    Layout("overlap, data parallel", {"overlap_grad_reduce": True}, data=2),
    Layout("distributed optimizer", {"distributed_optimizer": True}, data=2),
    Layout("overlap, distributed optimizer, two stages", {"pipeline": 2, **_OVERLAP, "distributed_optimizer": True}, 2),
    Layout("full recomputation", {"pipeline": 2}, training={"recompute": "full"}),
    Layout("selective recomputation, sequence parallel", {"tensor": 2, "sequence": True}, training=_SELECTIVE),
]
_PROVEN_ON_CPU = {"two stages", "sequence parallel", "data parallel", "two chunks", "filled, two stages"}
_PROVEN_ON_CPU |= {"megatron, two chunks", "distributed optimizer", "full recomputation"}
EXITS = {"layers": [2, 5], "head": ["mlp", "block"], "weight_schedule": {"shape": "constant"}}
ON_CPU = [layout for layout in LAYOUTS if layout.name in _PROVEN_ON_CPU]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multigpu")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def one_gpus(folder: Path, gpu: Place) -> Steps:
    return _steps(folder, gpu, Layout("alone", {}))


@pytest.fixture(scope="module")
def one_cpus(folder: Path, cpu_place: Place) -> Steps:
    return _steps(folder, cpu_place, Layout("alone", {}))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_steps_equal_one_gpus(folder: Path, gpu: Place, one_gpus: Steps, layout: Layout) -> None:
    _assert_same(_steps(folder, gpu, layout), one_gpus, layout)


@pytest.mark.parametrize("layout", ON_CPU, ids=lambda layout: layout.name)
def test_steps_equal_one_cpus(folder: Path, cpu_place: Place, one_cpus: Steps, layout: Layout) -> None:
    _assert_same(_steps(folder, cpu_place, layout), one_cpus, layout)


def test_layernorms_are_recomputed_with_transformer_engine(folder: Path, gpu: Place) -> None:
    if (problem := gpu.run(1, cases.engine_problem)[0]) is not None:
        pytest.skip(problem)
    modules = {"recompute": "selective", "recompute_modules": ["layernorm", "mlp"]}
    training = {"precision": "bf16", "train_iters": 2, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 0}
    figures = [
        gpu.run(
            2,
            cases.train_on_engine,
            first_step_config(folder, name=name, parallel={"pipeline": 2}, training={**training, **recompute}),
            1,
        )[0]["figures"][1]
        for name, recompute in (("kept", {}), ("recomputed", modules))
    ]
    assert_same_first_step(figures[1], figures[0], loss=1e-3, norm=1e-2)


def test_a_recorded_step_ends(folder: Path, place: Place) -> None:
    """Recording waits for the device around each action, while receives that were posted ahead are still open."""
    config = first_step_config(folder, name=f"{place.device}-recorded", parallel={"pipeline": 2})
    num_microbatches = config.training.global_batch_size // config.training.micro_batch_size
    assert min(place.run(2, cases.recorded_spans, config)) >= 2 * num_microbatches, "each has an F and a B"


def test_phases_of_two_stages_sum_to_the_step(folder: Path, place: Place) -> None:
    config = first_step_config(folder, name=f"{place.device}-timed", parallel={"pipeline": 2})
    figures = place.run(2, cases.train_on, config)[0]["figures"]
    phases = {name: seconds for name, seconds in figures[6].items() if name.startswith("time/")}
    assert min(phases.values()) > 0
    assert 0.95 < sum(phases.values()) / figures[6]["perf/iter_time_s"] < 1.001
    assert 0 < figures[1]["pipeline/planned_bubble_fraction"] < figures[1]["pipeline/bubble_fraction"] < 1


def _steps(folder: Path, place: Place, layout: Layout) -> Steps:
    """Figures of two steps: overlapped sums begin in the second."""
    name = f"{place.device}-{layout.name}".replace(" ", "-").replace(",", "")
    training = {"train_iters": 6, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 0, **layout.training}
    config = first_step_config(
        folder,
        name=name,
        parallel=layout.parallel,
        training=training,
        exits=EXITS,
        optimizer={"epsilon": 1e-3},  # or the first update would be the gradient's sign, rounding noise included
    )
    return place.run(layout.world_size, cases.train_on, config, 2)[0]["figures"]


def _assert_same(actual: Steps, expected: Steps, layout: Layout) -> None:
    norm = math.inf if layout.is_filled else 1e-4
    assert_same_first_step(actual[1], expected[1], loss=1e-5, norm=norm)
    if not layout.is_filled:
        assert_same_first_step(actual[2], expected[2], loss=1e-4, norm=1e-3)
