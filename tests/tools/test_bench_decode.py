"""The bench itself: what it writes. Its figures are nobody's test."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train_and_save, write_small_dataset
from helpers.tools import ToolsHere

Bench = Callable[..., subprocess.CompletedProcess[str]]
FIELDS = {"measure", "value", "goal", "better", "spread", "aa", "context"}
POLICIES = ("recompute", "fill", "propagate")
OVER = ("over_full", "of_law", "over_huggingface")
DRAFTS = ("E2_d2", "E5_d2", "E2_dauto", "E5_dauto", "Eauto_dauto")
OTHER_MEASURES = ("recompute_margin_0.8", "recompute_entropy_0.8", "recompute_cosine_0.9", "recompute_gate_0.7")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """In this very process."""
    return partial(ToolsHere(monkeypatch, capsys), "bench_decode.py", "--small")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    folder = tmp_path_factory.mktemp("decode")
    write_small_dataset(folder)
    config = run_config(folder, exits={"layers": [2, 5], "gate": "linear"}, training={"train_iters": 1})
    ranks.run(1, train_and_save, config)
    return folder / "runs/tiny"


def test_a_small_run_writes_every_measure_and_field(tmp_path: Path, run: Path, bench: Bench) -> None:
    output = tmp_path / "bench/decode.json"
    done = bench("--checkpoint", run, "--output", output)
    assert done.returncode == 0, done.stderr
    measures = json.loads(output.read_text())
    settings = [f"{policy}_{threshold}" for policy in POLICIES for threshold in (0.1, 0.9)]
    cells = [f"{setting}_b1" for setting in (*settings, *OTHER_MEASURES)] + [f"{setting}_b3" for setting in settings]
    drafting = [(f"{setting}_b1", OVER[: 2 + ("auto" not in setting)]) for setting in DRAFTS] + [("E2_d2_b3", OVER[:2])]
    assert [measure["measure"] for measure in measures] == [
        "full_depth_over_huggingface_b1",
        "full_depth_over_huggingface_b3",
        *(f"exits_over_{other}_{cell}" for cell in cells for other in ("full", "ideal")),
        *(f"speculation_{other}_{cell}" for cell, others in drafting for other in others),
    ]
    for measure in measures:
        assert measure.keys() == FIELDS
        low, high = measure["spread"]
        assert 0 < low <= measure["value"] <= high
        assert measure["aa"] > 0
    of = {measure["measure"]: measure for measure in measures}
    assert of["full_depth_over_huggingface_b1"]["goal"] == 2.0
    assert of["full_depth_over_huggingface_b1"]["context"]["same_tokens"] == 1
    assert of["exits_over_ideal_recompute_0.9_b1"]["goal"] == 0.9
    for name, measure in of.items():
        if name.startswith("exits_over_full"):
            context = measure["context"]
            assert context["verdict"] in ("pays", "does not pay", "even")
            assert 2 <= context["mean_depth"] <= 8 and 0 <= context["agreement"] <= 1
            assert context["loss_under_full_depth"] > 0
            assert sum(context["tokens_by_exit"].values()) == 2 * 6 * (3 if name.endswith("_b3") else 1)
    for policy in POLICIES:  # nothing is that sure of itself: all at full depth, which agrees with itself
        context = of[f"exits_over_full_{policy}_0.9_b1"]["context"]
        assert (context["mean_depth"], context["agreement"], context["phi"]) == (8, 1, 0)
    for name, measure in of.items():
        if name.startswith("speculation_over_full"):
            context = measure["context"]
            assert context["same_tokens"] == 1
            assert 0 <= context["acceptance"] <= 1
            assert 0 <= context["tokens_per_cycle"] - 1 <= context["drafted_per_cycle"] + 1e-9
            assert measure["goal"] == (min(1.3, context["law"]) if name.endswith("_b1") else None)
    assert of["speculation_of_law_E2_d2_b1"]["goal"] == 0.85
    beside = of["speculation_over_huggingface_E5_d2_b1"]
    assert beside["goal"] == 3.0
    assert 1 <= beside["context"]["huggingface_drafted_per_cycle"] <= 2
    assert beside["context"]["same_tokens"] == 1
    assert "one sequence: full depth" in done.stdout and "3 sequences: full depth" in done.stdout


def test_without_its_checkpoint_it_says_how_to_make_one(tmp_path: Path, bench: Bench) -> None:
    done = bench("--checkpoint", tmp_path / "none", "--output", tmp_path / "decode.json")
    assert done.returncode == 2
    assert done.stderr == (
        f"checkpoint: {tmp_path}/none is not a folder; `make bench-checkpoint` trains the one that this bench is for\n"
    )
