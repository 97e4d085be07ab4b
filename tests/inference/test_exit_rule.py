"""When an exit fires, for one request."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.exit_rule import ExitRule, Streak

EXITS = (2, 4, 6)


def rule(**params: object) -> ExitRule:
    return ExitRule(ExitParams.model_validate(params), EXITS, gated=())


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [
        (0.9, 0.9, True),
        (0.89, 0.9, False),
        (1.0, 0.9, True),
        (1.0, 1.0, False),  # a half-precision softmax rounds to 1
        (1.0, 1, False),
        (1.0, 0.9999, True),
        (0.0, 0.0, True),
        (0.0, 0, True),
        (math.nan, 0.0, False),
        (math.nan, 0.9, False),
        (math.nan, 1.0, False),
    ],
)
def test_an_exit_fires_at_its_threshold(confidence: float, threshold: float, expected: bool) -> None:
    assert rule(threshold=threshold).fires(4, confidence) is expected
    assert rule(thresholds={4: threshold}, threshold=0.5).fires(4, confidence) is expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {2: 0.9, 4: 0.9, 6: 0.9}),
        ({"mode": "full"}, {}),
        ({"mode": "full", "threshold": 0.0, "thresholds": {2: 0.0}}, {}),
        ({"threshold": 1.0}, {}),
        ({"threshold": 1}, {}),
        ({"threshold": 0}, {2: 0.0, 4: 0.0, 6: 0.0}),
        ({"threshold": 0.5, "min_exit": 3}, {4: 0.5, 6: 0.5}),
        ({"threshold": 0.5, "min_exit": 4}, {4: 0.5, 6: 0.5}),
        ({"exits": [6, 2]}, {2: 0.9, 6: 0.9}),
        ({"exits": []}, {}),
        ({"thresholds": {4: 0.4}}, {2: 0.9, 4: 0.4, 6: 0.9}),
        ({"threshold": 1.0, "thresholds": {4: 0.4}}, {4: 0.4}),
        ({"thresholds": {4: 1}}, {2: 0.9, 6: 0.9}),
        ({"thresholds": {4: 0.4}, "exits": [2]}, {2: 0.9}),
        ({"patience": 3}, {2: 0.9, 4: 0.9, 6: 0.9}),
        ({"patience": 4}, {}),  # so many in a row there never are, so none is looked at
    ],
)
def test_which_exits_may_fire(params: dict[str, object], expected: dict[int, float]) -> None:
    of_request = rule(**params)
    assert dict(of_request.thresholds) == expected
    assert list(of_request.thresholds) == sorted(expected)
    assert [layer for layer in (*EXITS, 8) if of_request.fires(layer, 1.0, streak=9)] == list(expected)


def test_an_exit_of_patience_waits_for_its_streak() -> None:
    patient = rule(threshold=0.5, patience=2)
    assert patient.needs_choices and not rule().needs_choices
    assert not patient.fires(4, 1.0, streak=1)
    assert patient.fires(4, 0.5, streak=2) and patient.fires(4, 0.5, streak=3)
    assert not patient.fires(4, 0.4, streak=3), "patience does not replace confidence"
    assert not patient.fires(4, math.nan, streak=3)


def test_a_streak_is_of_one_token_in_a_row() -> None:
    streak = Streak()
    assert [streak.see(choice) for choice in (7, 7, 7, 0, 0, 7)] == [1, 2, 3, 1, 2, 1]
    assert Streak().see(0) == 1


@given(st.lists(st.integers(0, 2), min_size=1), st.integers(1, 5))
def test_a_streak_is_what_it_says(choices: list[int], patience: int) -> None:
    streak = Streak()
    lengths = [streak.see(choice) for choice in choices]
    for number, length in enumerate(lengths):
        last = choices[max(0, number + 1 - patience) : number + 1]
        assert (length >= patience) == (len(last) == patience and len(set(last)) == 1)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"exits": [4]}, (4,)),
        ({"exits": [4], "measure": "cosine"}, (2, 4)),
        ({"exits": [2, 6], "measure": "cosine"}, (2, 4, 6)),
        ({"exits": [2], "measure": "cosine"}, (2,)),  # the embeddings are before it
        ({"exits": [6], "measure": "margin", "patience": 1}, (6,)),
        ({"patience": 2}, EXITS),
        ({"measure": "cosine", "mode": "full"}, ()),
        ({"threshold": 1.0}, ()),
    ],
)
def test_where_a_row_is_looked_at(params: dict[str, object], expected: tuple[int, ...]) -> None:
    assert rule(**params).stops_at(EXITS) == expected


def test_an_exit_that_is_only_compared_with_does_not_fire() -> None:
    of_request = rule(exits=[4], measure="cosine", threshold=0.0)
    assert not of_request.fires(2, 1.0)
    assert of_request.fires(4, 0.0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"exits": [2, 3]}, "exits.1: there is no exit after layer 3, only after [2, 4, 6]"),
        ({"thresholds": {8: 0.5}}, "thresholds.8: there is no exit after layer 8, only after [2, 4, 6]"),
        ({"exits": [3], "mode": "full"}, "exits.0: there is no exit after layer 3, only after [2, 4, 6]"),
    ],
)
def test_an_exit_that_is_not_there_is_named(params: dict[str, object], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        rule(**params)
    assert str(caught.value) == f"inference.exit.{message}"


def test_a_model_without_exits_runs_in_full() -> None:
    assert not ExitRule(ExitParams(), (), gated=()).thresholds
    with pytest.raises(FieldError, match=r"exits\.0: there is no exit after layer 2: exits\.layers is empty"):
        ExitRule(ExitParams(exits=(2,)), (), gated=())


def test_gates_that_are_not_there_are_named() -> None:
    with pytest.raises(FieldError, match=r"no gate after layers \[2, 4, 6\], none at all \(exits.gate\)") as caught:
        rule(measure="gate")
    assert caught.value.field == "inference.exit.measure"
    with pytest.raises(FieldError, match=r"no gate after layers \[2, 6\], only after \[4\]"):
        ExitRule(ExitParams(measure="gate"), EXITS, gated=[4])
    for nobody_is_asked in ({"mode": "full"}, {"threshold": 1.0}, {"exits": []}, {"patience": 9}):
        assert not rule(measure="gate", **nobody_is_asked).thresholds
    assert ExitRule(ExitParams(measure="gate", exits=(4,)), EXITS, gated=[4]).thresholds == {4: 0.9}


def test_the_rest_is_what_the_request_says() -> None:
    of_request = rule(measure="own", kv_policy="propagate", max_pending=3, patience=2)
    said = (of_request.measure, of_request.kv_policy, of_request.max_pending, of_request.patience)
    assert said == ("own", "propagate", 3, 2)
