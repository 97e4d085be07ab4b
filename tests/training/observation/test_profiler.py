"""Profiles of real runs: which ranges are in them, where they are, and that nothing else changes."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train, write_small_dataset

from megatron_ee.config import Config
from megatron_ee.device import choose_device
from megatron_ee.parallel.layout import layout_of
from megatron_ee.parallel.pipeline.plan import Kind
from megatron_ee.training.build import build_trainer
from megatron_ee.training.planning import plan_step

VOCAB_SIZE = 320  # of bytes, padded
PARALLEL: dict[str, dict[str, Any]] = {
    "one-process": {"data": 1},
    "two-stages": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"},
    "two-data-ranks": {"data": 2},
    "megatron": {"pipeline": 2, "schedule": "megatron"},
}
IN_PARTS = {"one-process", "two-stages"}  # the others hold them, too
WINDOW = {"start": 2, "iterations": 2}
PHASES = ["data", "prepare", "pipeline", "grad_sync", "optimizer"]
Ranges = list[tuple[str, float, float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    write_small_dataset(folder)
    return folder


def _config(folder: Path, parallel: str, name: str, window: dict[str, int] | None) -> Config:
    return run_config(
        folder,
        name=f"{parallel}-{name}",
        parallel=PARALLEL[parallel],
        training={"train_iters": 4},
        logging={"interval": 1, "profile": window},
    )


def _ranges(path: Path) -> Ranges:
    """Name, begin and end of what was marked on the CPU, in order."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    marked = [event for event in events if event.get("cat") == "user_annotation"]
    marked.sort(key=lambda event: event["ts"])
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in marked]


def _within(ranges: Ranges, *outer: str) -> list[str]:
    """What is within the first range of a name, within the first of another ..., in order."""
    for name in outer:
        _, begin, end = next(marked for marked in ranges if marked[0] == name)
        ranges = [marked for marked in ranges if begin <= marked[1] and marked[2] <= end and marked[0] != name]
    return [name for name, _, _ in ranges]


@pytest.mark.parametrize(
    "parallel",
    [pytest.param(name, marks=[pytest.mark.slow] if name in (*IN_PARTS, "interleaved") else []) for name in PARALLEL],
)
def test_a_profile_holds_the_plans_actions(folder: Path, ranks: RankPool, parallel: str) -> None:
    config = _config(folder, parallel, "profiled", WINDOW)
    ranks.run(1 if parallel == "one-process" else 2, train, config)
    num_microbatches = 2 if parallel == "two-data-ranks" else 4
    plan = plan_step(config, layout_of(config, VOCAB_SIZE), VOCAB_SIZE, num_microbatches)
    paths = sorted((folder / "runs" / config.name / "profiles").iterdir())
    names = [f"step_00000002-rank_{stage}.json.gz" for stage in range(plan.num_stages)]
    assert [path.name for path in paths] == names, "one pipeline's"
    known = {str(action) for actions in plan.actions for action in actions}
    for actions, path in zip(plan.actions, paths, strict=True):
        ranges = _ranges(path)
        shown = [str(action) for action in actions if parallel != "megatron" or action.kind is Kind.F]
        assert [name for name, _, _ in ranges if name.startswith("step ")] == ["step 2", "step 3"]
        for step in ("step 2", "step 3"):
            in_step = _within(ranges, step)
            assert [name for name in in_step if name in known] == shown
            assert [name for name in in_step if name in PHASES] == PHASES
        assert [name for name in _within(ranges, "step 2", "pipeline") if name in known] == shown
        assert [name for name, _, _ in ranges if name in known] == 2 * shown, "and nowhere else"


def test_a_profiled_run_is_the_same_run(folder: Path, ranks: RankPool) -> None:
    config, plain = (_config(folder, "two-stages", *run) for run in (("profiled-too", WINDOW), ("plain", None)))
    profiled, other = (ranks.run(2, train, run)[0] for run in (config, plain))
    assert not (folder / "runs" / plain.name / "profiles").exists()
    for iteration, figures in other["figures"].items():
        losses = {name: value for name, value in figures.items() if name.endswith("/loss")}
        assert losses.items() <= profiled["figures"][iteration].items()
    for name, parameter in other["parameters"].items():
        assert (profiled["parameters"][name] == parameter).all()


def _train_with_warnings(config: Config, until: int) -> list[str]:
    """On each rank: what was warned of in a run that stops early."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megatron_ee")
    log.addHandler(handler)
    trainer = build_trainer(config, choose_device("cpu"))
    trainer.train(until)
    trainer.save()
    trainer.profiler.close()
    log.removeHandler(handler)
    return [warning for warning in warnings if "profile" in warning]


@pytest.mark.slow
def test_a_run_that_stops_within_the_window_leaves_both_parts(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "one-process", "stopped", {"start": 2, "iterations": 3})
    assert ranks.run(1, _train_with_warnings, config, 2) == [[]]
    assert ranks.run(1, _train_with_warnings, config, 4) == [[]]
    paths = sorted((folder / "runs" / config.name / "profiles").iterdir())
    assert [path.name for path in paths] == ["step_00000002-rank_0.json.gz", "step_00000003-rank_0.json.gz"]
    steps = [[name for name, _, _ in _ranges(path) if name.startswith("step ")] for path in paths]
    assert steps == [["step 2"], ["step 3", "step 4"]]


def test_a_profile_that_cannot_be_written_is_a_warning(folder: Path, ranks: RankPool) -> None:
    config = _config(folder, "one-process", "unwritable", {"start": 1, "iterations": 1})
    run = folder / "runs" / config.name
    run.mkdir(parents=True)
    (run / "profiles").write_text("in the way")
    ((warning,),) = ranks.run(1, _train_with_warnings, config, 2)
    assert warning.startswith("going on without the profile of iteration 1 and on: ")
