"""Training on one GPU against the same run in fp32 on the CPU."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import cases
from gpu.conftest import Place
from gpu.runs import assert_same_first_step, first_step_config
from helpers.runs import run_config, write_small_dataset

from megatron_ee.checkpoint.folders import newest_checkpoint

BF16 = {"precision": "bf16", "train_iters": 6, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_small_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, cpu_place: Place) -> dict[int, dict[str, float]]:
    """Figures of two steps in fp32 on the CPU."""
    (result,) = cpu_place.run(1, cases.train_on, first_step_config(folder, name="expected"), 2)
    return result["figures"]


def test_fp32_steps_equal_the_cpus(folder: Path, place: Place, expected: dict[int, Any]) -> None:
    (result,) = place.run(1, cases.train_on, first_step_config(folder, name="fp32"), 2)
    assert (result["device"], result["backend"]) == {"cpu": ("cpu", "gloo"), "cuda": ("cuda", "nccl")}[place.device]
    assert_same_first_step(result["figures"][1], expected[1], loss=1e-3, norm=1e-3)
    # AdamW's first update is the gradient's sign: where that is rounding noise, parameters part
    assert_same_first_step(result["figures"][2], expected[2], loss=1e-2, norm=5e-2)


def test_a_bf16_step_is_near_the_cpus_in_fp32(folder: Path, place: Place, expected: dict[int, Any]) -> None:
    (result,) = place.run(1, cases.train_on, first_step_config(folder, name="bf16", training=BF16), 1)
    assert_same_first_step(result["figures"][1], expected[1], loss=2e-2, norm=5e-2)


def test_a_run_validates_saves_and_goes_on(folder: Path, place: Place) -> None:
    """A whole run over groups of one process, in one go and in two."""
    training = {"train_iters": 6, "global_batch_size": 4, "micro_batch_size": 1, "eval_iters": 1}
    name = f"{place.device}-in-two"
    config = run_config(folder, name=name, training=training)
    (whole,) = place.run(1, cases.train_on, run_config(folder, name=f"{place.device}-whole", training=training))
    place.run(1, cases.train_and_save, config, 3)
    (rest,) = place.run(1, cases.train_on, config)
    assert rest["started_at"] == 3
    assert rest["figures"][6]["val/loss"] == pytest.approx(whole["figures"][6]["val/loss"], rel=1e-3)
    assert whole["figures"][6]["train/exit_8/loss"] < whole["figures"][1]["train/exit_8/loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_the_same_on_the_cpu(folder: Path, place: Place, cpu_place: Place, precision: str) -> None:
    name = f"{place.device}-{precision}"
    config = first_step_config(folder, name=name, training={**BF16, "precision": precision})
    (written,) = place.run(1, cases.train_and_save, config, 2)
    step = newest_checkpoint(folder / "runs" / name)
    assert step is not None
    (read,) = cpu_place.run(1, cases.read, step, config)
    assert read.keys() == written["parameters"].keys()
    for parameter, value in written["parameters"].items():
        np.testing.assert_array_equal(read[parameter], value, err_msg=parameter)
    (resumed,) = cpu_place.run(1, cases.train_on, config, 3)
    assert resumed["started_at"] == 2
    assert np.isfinite(resumed["figures"][3]["train/loss"])


def _memory_config(folder: Path, place: Place, exits: list[int]) -> Any:
    """Large enough on a GPU that activations outweigh the libraries' workspaces."""
    changes: dict[str, Any] = {"training": BF16}
    if place.device == "cuda":
        changes["model"] = {"hidden_size": 512, "ffn_hidden_size": 1408, "vocab_size": 8192}
        changes["data"] = {"sequence_length": 512}
        changes["training"] = {**BF16, "global_batch_size": 8, "micro_batch_size": 4}
    exits_section = {"layers": exits, "weight_schedule": {"shape": "constant"}}
    return run_config(folder, name=f"memory-{len(exits)}", exits=exits_section, **changes)


def test_exits_take_hardly_more_memory_than_they_must(folder: Path, place: Place) -> None:
    """`make bench-gpu` has the figure, whose goal is 1.03; this bound leaves room for an allocator's habits."""
    config = _memory_config(folder, place, [2, 5])
    (without,) = place.run(1, cases.memory_of_a_step, _memory_config(folder, place, []))
    (having,) = place.run(1, cases.memory_of_a_step, config)
    heads = having["parameters"] - without["parameters"]
    assert heads > 0
    ratio = (having["peak"] - heads - cases.allowance_for_exits(config)) / without["peak"]
    assert ratio <= 1.10


def test_phases_of_a_step_sum_to_it(folder: Path, place: Place) -> None:
    """On a GPU they are read from events on its stream, for which no step waits."""
    (result,) = place.run(1, cases.train_on, run_config(folder, name=f"{place.device}-timed"))
    for iteration in (3, 4, 5):
        figures = result["figures"][iteration]
        phases = {name: seconds for name, seconds in figures.items() if name.startswith("time/")}
        assert {f"time/{phase}_s" for phase in ("data", "forward", "exits", "backward", "optimizer")} < phases.keys()
        assert min(phases.values()) > 0
    assert 0.95 < sum(phases.values()) / figures["perf/iter_time_s"] < 1.001


def test_a_profile_has_the_plans_actions_and_kernels(folder: Path, place: Place) -> None:
    config = run_config(folder, name=f"{place.device}-profiled", logging={"profile": {"start": 2, "iterations": 2}})
    place.run(1, cases.train_on, config, 4)
    with gzip.open(folder / "runs" / config.name / "profiles/step_00000002-rank_0.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if "cat" in event]
    marked = [event["name"] for event in events if event["cat"] == "user_annotation"]
    assert [marked.count(action) for action in ("F0@0", "X0@0", "B3@0")] == [2, 2, 2]
    assert ("kernel" in {event["cat"] for event in events}) == (place.device == "cuda")
