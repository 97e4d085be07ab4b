"""Costs between what was measured and beyond it, and their file."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.costs import SegmentCosts, cost_of, estimated_costs, read_costs, write_costs

COSTS = SegmentCosts(
    {(0, 2): ((1, 0.5), (4, 0.75)), (2, 8): ((1, 1.5), (4, 1.5), (16, 3.5))},
    {2: ((1, 0.25),), 8: ((1, 0.125),)},
    {(2, 8): ((1, 0.5),)},
    step=0.01,
    token=0.001,
)


def test_costs_lie_on_straight_lines() -> None:
    curve = COSTS.segments[2, 8]
    assert [cost_of(curve, rows) for rows in (0, 1, 3, 4, 10, 16, 22)] == [0, 1.5, 1.5, 1.5, 2.5, 3.5, 4.5]
    assert [cost_of(((2, 0.5),), rows) for rows in (1, 2, 6)] == [0.25, 0.5, 1.5]
    assert COSTS.of(0, 8, 4) == 0.75 + 1.5
    assert COSTS.of(2, 8, 16) == 3.5
    assert (COSTS.of_head(2, 4), COSTS.of_head(5, 4)) == (1.0, 0.0)


def test_estimates_are_what_layers_read_and_a_share_for_each_more_row() -> None:
    costs = estimated_costs([1.0, 2.0, 4.0], [1], row=0.5)
    assert (costs.of(0, 1, 1), costs.of(1, 3, 1), costs.of(0, 3, 3)) == (1.0, 6.0, 7.0 * 2)


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    write_costs(tmp_path / "new/costs.json", COSTS)
    assert read_costs(tmp_path / "new/costs.json") == COSTS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["costs.json"]
    content = json.loads((tmp_path / "new/costs.json").read_text())
    few = {name: content[name] for name in ("unit", "segments", "heads")}
    (tmp_path / "few.json").write_text(json.dumps(few))
    assert read_costs(tmp_path / "few.json") == SegmentCosts(COSTS.segments, COSTS.heads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "ms"}, "unit: 'ms', not 'seconds'"),
        ({"segments": []}, "segments: there is none"),
        ({"segments": {}}, "segments: is no list"),
        ({"segments": [[0, 2]]}, r"segments\[0\]: is no list of 3"),
        ({"segments": [[1, 2, [[1, 1]]]]}, r"segments\[0\]: 1 to 2 is no segment that begins after layer 0"),
        ({"segments": [[0, 0, [[1, 1]]]]}, r"segments\[0\]: 0 to 0 is no segment"),
        ({"segments": [[0, 2, [[1, 1]]], [3, 8, [[1, 1]]]]}, r"segments\[1\]: 3 to 8 is .* after layer 2"),
        ({"segments": [[0, True, [[1, 1]]]]}, r"segments\[0\]: 0 to True"),
        ({"segments": [[0, 8, []]]}, r"segments\[0\]: has no list of \[rows, cost\]"),
        ({"segments": [[0, 8, [[1, "x"]]]]}, r"segments\[0\]: \[1, 'x'\] is no \[rows, cost\]"),
        ({"segments": [[0, 8, [[1, -0.5]]]]}, r"segments\[0\]: a cost of -0.5 is below 0"),
        ({"segments": [[0, 8, [[0, 1]]]]}, r"segments\[0\]: 0 rows come after 0"),
        ({"segments": [[0, 8, [[4, 1], [2, 1]]]]}, r"segments\[0\]: 2 rows come after 4"),
        ({"heads": [[5, [[1, 1]]]]}, r"heads\[0\]: no segment ends after layer 5"),
        ({"heads": [[2, [[1, 1]]], [2, [[1, 1]]]]}, r"heads\[1\]: .* is there already"),
        ({"stores": [[0, 8, [[1, 1]]]]}, r"stores\[0\]: 0 to 8 is no segment"),
        ({"step": -1}, "step: -1 is no cost of 0 or more"),
        ({"token": "x"}, "token: 'x' is no cost"),
        ({"heads": [[2, [[1, float("inf")]]]]}, r"heads\[0\]: \[1, inf\] is no"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "costs.json"
    write_costs(path, COSTS)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FieldError, match=rf"costs\.json: {said}"):
        read_costs(path)


@pytest.mark.parametrize("content", [None, "{", "[]", "3"])
def test_a_file_of_something_else_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(FieldError, match=r"costs\.json"):
        read_costs(path)
