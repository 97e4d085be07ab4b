"""The page of results: its numbers are those of the files beside it, and of nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import reproduce_measured
from reproduce_claims import claims_of
from reproduce_page import page_of
from reproduce_results import Results, Spread

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/results"


def test_the_page_is_what_its_figures_make() -> None:
    """After a change of the template or of figures: tools/reproduce.py --page"""
    assert page_of(Results.read(FOLDER)) == (ROOT / "docs/results.md").read_text()


def test_another_figure_makes_another_page() -> None:
    content = Results.read(FOLDER).content
    for name in ("runs", "costs"):
        changed = json.loads(json.dumps(content))
        if name == "runs":
            changed["runs"]["runs"]["every_second-2"]["loss"]["4"] += 0.1
        else:
            changed["costs"]["steps"]["mlp_heads"]["ratio"] += 0.1
        assert page_of(Results(changed)) != page_of(Results(content)), name


def test_it_is_made_of_whatever_sizes_were_measured() -> None:
    """In miniature there are fewer sequences, and nobody has a GPU."""
    content = dict(Results.read(FOLDER).content)
    for name, sizes in (("decode", {"_b16": "_b3"}), ("serve", {"_r16": "_r5", "_r64": "_r7", "_s16": "_s6"})):
        text = json.dumps(content[name])
        for size, other in sizes.items():
            text = text.replace(f'{size}"', f'{other}"')
        content[name] = json.loads(text)
    del content["gpu"]
    page = page_of(Results(content))
    assert "\n3 at a time:\n" in page and "\n5 at a time:\n" in page and "\n7 at a time:\n" in page
    assert "## What is often said" in page and "H200, a model" not in page


def test_runs_of_two_machines_are_not_set_beside_each_other() -> None:
    changed = json.loads(json.dumps(Results.read(FOLDER).content))
    changed["runs"]["runs"]["none-1"]["precision"] = "fp32"
    with pytest.raises(ValueError, match="too many values"):
        page_of(Results(changed))


def test_its_pictures_and_links_are_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs/results.md").read_text())
    assert len(linked) > 3
    assert [path for path in linked if not (ROOT / "docs" / path).exists()] == []


def test_a_spread_says_how_far_seeds_are_from_their_mean() -> None:
    assert Spread((1.0, 2.0, 4.5)).text(".2f") == "2.50 ±2.00"
    assert Spread((1.0, 2.0, 4.5)).text("+.1f") == "+2.5 ±2.0"
    assert Spread((1.25,)).text(".2f") == "1.25"


def test_of_drafts_the_fastest_that_drafts_is_named() -> None:
    """One that learns to draft nothing is full depth, and by chance faster than it."""
    settings = (("E4_d3", 1.1, 0.9), ("E2_d4", 0.7, 0.6), ("E6_auto", 1.2, 0.0))
    bench = [
        {"measure": f"speculation_over_full_{name}_b1", "value": speed, "context": {"acceptance": accepted}}
        for name, speed, accepted in settings
    ]
    assert reproduce_measured.setting_of(reproduce_measured.fastest_speculation(bench, 1)) == ["4", "3"]


def test_of_exits_the_fastest_that_agrees_is_named() -> None:
    settings = (("recompute_0.7", 0.9, 1.0), ("recompute_gate_0.7", 1.2, 0.96), ("propagate_0.7", 1.5, 0.9))
    bench = [
        {"measure": f"exits_over_full_{name}_b1", "value": speed, "context": {"agreement": agreement}}
        for name, speed, agreement in settings
    ]
    assert reproduce_measured.exit_setting(reproduce_measured.fastest_exit(bench, 1, 0.95)) == "recompute gate, 0.7"


def test_measures_of_confidence_are_ranked_in_the_middle_of_the_depths() -> None:
    of = {"depth": [2.0, 5.0, 8.0], "entropy": [0.9, 0.7, 1.0], "max_probability": [0.5, 0.8, 1.0]}
    said = reproduce_measured.ranking({"at_mean_depth": of})
    assert said == "At a mean depth of 5 layers they agree with full depth on: max probability 80.0%, entropy 70.0%"


CLAIMS = [
    "1.5 to 3 times",
    "batches above 32",
    "1.8 times on mixed loads",
    "sweet spot",
    "95 to 99 % of the quality",
    "a fifth to a third of the depth",
    "15 % less memory",
    "SLED improves accuracy",
    "intermediate layers sometimes beat the last",
    "a frozen model gives unstable exits",
    "1,000 iterations of warm-up",
    "saves energy",
]


def test_while_figures_are_missing_nothing_is_claimed() -> None:
    content = dict(Results.read(FOLDER).content)
    del content["serve"]
    page = page_of(Results(content))
    assert "Not all of it is measured yet" in page
    assert "## What is often said" not in page and "## 6." not in page and "## 5." in page


def test_what_is_often_said_has_its_line() -> None:
    rows = list(claims_of(Results.read(FOLDER)))
    assert len(rows) == len(CLAIMS)
    assert [claim for claim, row in zip(CLAIMS, rows, strict=True) if claim not in row[0]] == []
    assert all(len(row) == 3 and all(row) for row in rows)
