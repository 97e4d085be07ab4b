"""The bench itself: what it writes, what it makes of recorded launches, and what it calls possible."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset
from helpers.tools import TOOLS, ToolsHere

from megatron_ee.inference.request import Emission
from megatron_ee.inference.scheduling.costs import SegmentCosts
from megatron_ee.inference.scheduling.simulate import SimulatedRequest

Bench = Callable[..., subprocess.CompletedProcess[str]]
FIELDS = {"measure", "value", "goal", "better", "spread", "aa", "context"}
POLICIES = ("recompute", "fill", "propagate")
STRATEGIES = ("lockstep", "compaction", "rebatch")
RATIOS = ("over_lockstep", "over_full", "of_bound", "of_best", "simulated")


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    sys.path.insert(0, str(TOOLS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_small_dataset(folder)
    config = run_config(folder, exits={"layers": [2, 5]}, training={"train_iters": 1})
    ranks.run(1, train_and_save, config)
    return folder / "runs/tiny"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> Bench:
    """In this very process, with the small run."""
    return partial(ToolsHere(monkeypatch, capsys), "bench_serve.py", "--small", "--checkpoint", run)


@pytest.mark.slow
def test_a_small_run_writes_every_measure_and_field(tmp_path: Path, bench: Bench) -> None:
    output = tmp_path / "bench/serve.json"
    measures = []
    for load in ("r2", "r6", "r2_poisson"):
        done = bench("--only", load, "--output", output)
        assert done.returncode == 0, done.stderr
        measures += json.loads(output.read_text())
    settings = [(strategy, policy) for policy in POLICIES for strategy in STRATEGIES]
    assert [measure["measure"] for measure in measures] == [
        f"serve_{ratio}_{strategy}_{policy}_{load}"
        for load in ("r2", "r6")
        for strategy, policy in settings
        for ratio in RATIOS[strategy == "lockstep" :]
    ] + [f"serve_request_p95_over_lockstep_{strategy}_{policy}_r2_poisson" for strategy, policy in settings]
    for measure in measures:
        assert measure.keys() == FIELDS
        low, high = measure["spread"]
        assert 0 < low <= measure["value"] <= high
        assert measure["aa"] > 0
        context = measure["context"]
        assert context["forced"] == context["other_depths_than_alone"] == context["other_by_rounding"] == 0
        report = context["report"]
        assert report["requests"] == 8 and report["tokens"] == sum(context["tokens_by_exit"].values())
        assert 0 < context["share_planning"] < context["share_beside_launches"] < 1
    of = {measure["measure"]: measure for measure in measures}
    assert of["serve_over_lockstep_rebatch_fill_r6"]["goal"] == 0.99
    assert of["serve_of_bound_rebatch_fill_r6"]["goal"] == of["serve_of_best_rebatch_fill_r2"]["goal"] == 0.9
    assert of["serve_of_bound_rebatch_fill_r2"]["goal"] is None
    assert of["serve_of_bound_rebatch_fill_r2"]["context"]["texts_compared_with_alone"] == 3 * (2 * 4 + 4)
    filled = {
        policy: sum(
            slots["filled"] for slots in of[f"serve_over_full_compaction_{policy}_r6"]["context"]["report"]["slots"]
        )
        for policy in POLICIES
    }
    assert filled["recompute"] == filled["propagate"] == 0 < filled["fill"]


def test_a_load_that_is_not_there_is_one_message_and_no_file(tmp_path: Path, bench: Bench) -> None:
    output = tmp_path / "serve.json"
    done = bench("--only", "r17", "--output", output)
    assert (done.returncode, done.stderr) == (2, "--only: 'r17' is none of r2, r6, r2_poisson, pipeline\n")
    assert not output.exists()


def test_costs_are_means_of_recorded_launches_that_never_fall() -> None:
    from bench_serve_costs import curve_of, line_of

    assert curve_of([(1, 2.0), (1, 4.0), (2, 5.0)]) == ((1.0, 3.0), (2.0, 5.0))
    assert curve_of([(1, 3.0), (2, 6.0), (3, 4.0), (4, 7.0)]) == ((1.0, 3.0), (2.5, 5.0), (4.0, 7.0))
    assert curve_of([(16, 1.0), (17, 3.0), (64, 8.0)]) == ((16.5, 2.0), (64.0, 8.0))
    assert line_of([(0, 1.0), (2, 5.0), (4, 9.0)]) == (1.0, 2.0)
    assert line_of([(0, 5.0), (2, 1.0)]) == (3.0, 0.0), "nothing takes less than no time, and the mean stays"
    step, token = line_of([(1, 0.0), (3, 9.0)])
    assert (step, token) == (0.0, 2.25)


def test_no_launches_cost_less_than_the_bound() -> None:
    """By hand: 4 tokens a launch, two segments, launches of r rows cost 1 + r."""
    from bench_serve_bound import least_seconds, lower_hull, prompt_rates, rows_of

    line = ((1.0, 2.0), (101.0, 102.0))
    costs = SegmentCosts({(0, 4): line, (4, 8): line}, {4: ((1.0, 1.0), (2.0, 1.0)), 8: ((1.0, 2.0), (2.0, 2.0))})
    request = SimulatedRequest(10, (4, 8, 4, 8, 4))
    assert [rows_of(request, segment, propagates=False) for segment in costs.segments] == [(10, 4), (10, 3)]
    assert [rows_of(request, segment, propagates=True) for segment in costs.segments] == [(10, 4), (9, 2)]
    rates = {(0, 4): 0.5, (4, 8): 0.25}
    load = [request] * 4
    exact = least_seconds(load, costs, rates, launch_rows=4, kv_policy="recompute")
    prompts = 40 * 0.5 + 40 * 0.25
    assert exact == pytest.approx(prompts + 4 * (1 + 16 / 4) + 4 * 1.0 + 2 * (1 + 12 / 2) + 2 * 2.0)
    propagated = least_seconds(load, costs, rates, launch_rows=4, kv_policy="propagate")
    prompts = 40 * 0.5 + 36 * 0.25
    assert propagated == pytest.approx(prompts + 4 * (1 + 16 / 4) + 4 * 1.0 + 2 * (1 + 8 / 2) + 2 * 2.0)
    assert prompt_rates(costs)[0, 4] == pytest.approx(102 / 101)
    assert lower_hull(((1, 1.0), (2, 4.0), (3, 3.0), (4, 9.0))) == ((1, 1.0), (3, 3.0), (4, 9.0))


def test_rounding_is_told_from_other_depths() -> None:
    from bench_serve_rounds import differences

    def text(*tokens: tuple[int, int, float]) -> list[Emission]:
        return [Emission(*of) for of in tokens]

    own = text((1, 2, 0.9), (5, 8, 1.0), (6, 2, 0.7))
    assert differences(own, own, 0.4) == (0, 0)
    assert differences(text((1, 2, 0.9), (7, 8, 1.0), (9, 8, 1.0)), own, 0.4) == (1, 0), "another token, and all after"
    assert differences(text((1, 2, 0.9), (5, 2, 0.4004), (6, 2, 0.7)), own, 0.4) == (1, 0), "at the threshold"
    assert differences(text((1, 2, 0.9), (5, 2, 0.5), (6, 2, 0.7)), own, 0.4) == (0, 1)
