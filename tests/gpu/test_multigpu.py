"""One step in every kind of layout equals one GPU's, over NCCL; and over gloo, for two ranks, to prove the test."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gpu import cases
from gpu.conftest import Place
from gpu.runs import assert_same_first_step, first_step_config
from helpers.runs import write_small_dataset


class Layout(NamedTuple):
    """How a run is split."""

    name: str
    parallel: dict[str, Any]
    data: int = 1

    @property
    def world_size(self) -> int:
        return self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.data


_CHUNKS = {"chunks": 2, "schedule": "interleaved"}
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
]
_PROVEN_ON_CPU = {"two stages", "sequence parallel", "data parallel", "two chunks"}
ON_CPU = [layout for layout in LAYOUTS if layout.name in _PROVEN_ON_CPU]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multigpu")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def one_gpus(folder: Path, gpu: Place) -> dict[str, float]:
    """The first step's figures."""
    return _first_step(folder, gpu, Layout("alone", {}))


@pytest.fixture(scope="module")
def one_cpus(folder: Path, cpu_place: Place) -> dict[str, float]:
    return _first_step(folder, cpu_place, Layout("alone", {}))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_equals_one_gpus(folder: Path, gpu: Place, one_gpus: dict[str, float], layout: Layout) -> None:
    assert_same_first_step(_first_step(folder, gpu, layout), one_gpus, loss=1e-5, norm=1e-4)


@pytest.mark.parametrize("layout", ON_CPU, ids=lambda layout: layout.name)
def test_a_step_equals_one_cpus(folder: Path, cpu_place: Place, one_cpus: dict[str, float], layout: Layout) -> None:
    assert_same_first_step(_first_step(folder, cpu_place, layout), one_cpus, loss=1e-5, norm=1e-4)


def test_a_recorded_step_ends(folder: Path, place: Place) -> None:
    """Recording waits for the device around each action, while receives that were posted ahead are still open."""
    config = first_step_config(folder, name=f"{place.device}-recorded", parallel={"pipeline": 2})
    num_microbatches = config.training.global_batch_size // config.training.micro_batch_size
    assert min(place.run(2, cases.recorded_spans, config)) >= 2 * num_microbatches, "each has an F and a B"


def _first_step(folder: Path, place: Place, layout: Layout) -> dict[str, float]:
    name = f"{place.device}-{layout.name}".replace(" ", "-").replace(",", "")
    config = first_step_config(folder, name=name, parallel=layout.parallel)
    return place.run(layout.world_size, cases.train_on, config, 1)[0]["figures"][1]
