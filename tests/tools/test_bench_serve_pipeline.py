"""Benches of pipelines: what they call possible, stages that sleep, and what a run writes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset
from helpers.tools import TOOLS

from megatron_ee.inference.scheduling.costs import SegmentCosts

LAYER, HEAD = 0.001, 0.002


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    sys.path.insert(0, str(TOOLS))


def _costs() -> SegmentCosts:
    curve = ((1.0, LAYER), (2.0, LAYER))
    return SegmentCosts(
        {(layer, layer + 1): curve for layer in range(16)},
        dict.fromkeys((4, 8, 12, 16), ((1.0, HEAD), (2.0, HEAD))),
    )


def _course(depths: tuple[tuple[int, ...], ...], **more: Any) -> Any:
    from bench_serve_stages import Course

    of: dict[str, Any] = {"stops": (4, 8, 12, 16), "policy": "fill", "full": False, **more}
    return Course(exits=(4, 8, 12), depths=depths, costs=_costs(), **of)


def test_what_is_possible_is_counted_by_hand() -> None:
    from bench_serve_pipeline import ideal
    from bench_serve_stages import mean_stages

    course = _course(((4, 16), (8, 4)))
    assert mean_stages(course) == (1 + 4 + 2 + 1) / 4
    assert mean_stages(_course(((4, 16), (8, 4)), stops=(2, 5, 9, 16))) == (2 + 4 + 3 + 2) / 4
    full, exits = 4 * (16 * LAYER + HEAD), 32 * LAYER + 8 * HEAD
    assert ideal(course) == pytest.approx(full / exits)


def _serve(names: list[str]) -> list[Any]:
    sys.path.insert(0, str(TOOLS))
    from bench_serve_pipeline import courses_of
    from bench_serve_stages import serve_all

    courses = courses_of(_costs(), 2, 6)
    return serve_all([courses[name] for name in names], 1)


def test_stages_that_sleep_say_all_tokens_and_take_their_time(ranks: RankPool) -> None:
    from bench_serve_pipeline import courses_of
    from bench_serve_stages import mean_stages

    names = ["full", "equal_fill", "survival_recompute"]
    first, *others = ranks.run(4, _serve, names)
    assert all(other == first for other in others)
    courses = courses_of(_costs(), 2, 6)
    for name, [ran] in zip(names, first, strict=True):
        assert ran.tokens == 12, name
        assert all(0 <= real <= 1 and 0 <= filled <= 1 for real, filled in zip(ran.real, ran.filled, strict=True))
        assert ran.seconds > 6 * (4 if name == "full" else 1) * 4 * LAYER, name
        assert name == "equal_fill" or not any(ran.filled), name
    assert mean_stages(courses["full"]) == mean_stages(courses["equal_fill"]) < 4


@pytest.mark.slow
def test_a_small_run_writes_every_measure(
    tmp_path: Path, ranks: RankPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.tools import ToolsHere

    write_small_dataset(tmp_path)
    config = run_config(tmp_path, exits={"layers": [2, 5]}, training={"train_iters": 1})
    ranks.run(1, train_and_save, config)
    output = tmp_path / "serve.json"
    run = ToolsHere(monkeypatch, capsys)
    done = run(
        "bench_serve.py", "--small", "--only", "pipeline", "--checkpoint", tmp_path / "runs/tiny", "--output", output
    )
    assert done.returncode == 0, done.stderr
    found = [measure["measure"] for measure in json.loads(output.read_text())]
    assert found[:3] == [
        "pipeline2_over_full_fill_s1",
        "pipeline2_over_full_recompute_s1",
        "pipeline2_full_over_one_process_s1",
    ]
    for streams in (1, 2):
        assert f"pipeline_over_full_survival_fill_s{streams}" in found
        assert f"pipeline_survival_recompute_over_equal_s{streams}" in found
    assert "pipeline_of_ideal_equal_fill_s1" in found and "pipeline_of_bound_equal_recompute_s1" in found
