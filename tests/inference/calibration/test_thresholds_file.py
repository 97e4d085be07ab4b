"""The file of thresholds: what is written is read, and what is wrong with one is one message."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.calibration.thresholds_file import (
    EXIT_FIELDS,
    SAMPLING_FIELDS,
    read_thresholds,
    write_thresholds,
)

LAYERS = st.integers(1, 60)
CHANCES = st.floats(0, 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "thresholds.json"
    write_thresholds(path, "ab" * 32, ExitParams(thresholds={2: 0.9, 5: 1.0}), SamplingParams(), {"target": 0.05})
    return path


@given(
    thresholds=st.dictionaries(LAYERS, CHANCES),
    exits=st.none() | st.lists(LAYERS),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-5, 5)),
    temperature=st.floats(0, 2),
    mode=st.sampled_from(["early_exit", "full"]),
    measure=st.sampled_from(["max_probability", "one_of_my_own"]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    thresholds: dict[int, float],
    exits: list[int] | None,
    bias: dict[int, float],
    temperature: float,
    mode: Any,
    measure: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "thresholds.json"
    exit = ExitParams(mode=mode, measure=measure, thresholds=thresholds, exits=None if exits is None else tuple(exits))
    sampling = SamplingParams(temperature=temperature, logit_bias=bias)
    write_thresholds(path, "ab" * 32, exit, sampling, {})
    found = read_thresholds(path)
    assert found.checkpoint_hash == "ab" * 32
    assert ExitParams.model_validate(found.exit) == exit and set(found.exit) == set(EXIT_FIELDS)
    assert SamplingParams.model_validate(found.sampling) == sampling and set(found.sampling) == set(SAMPLING_FIELDS)


def test_people_can_read_it(file: Path) -> None:
    content = json.loads(file.read_text())
    assert content["thresholds"] == {"2": 0.9, "5": 1.0} and content["measure"] == "max_probability"
    assert content["promise"] == {"target": 0.05}
    assert {path.name for path in file.parent.iterdir()} == {"thresholds.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: 2, not 1"),
        ({"version": True}, "version: True, not 1"),
        ({"checkpoint_hash": None}, "checkpoint_hash: None is none"),
        ({"thresholds": [0.9]}, r"thresholds: \[0.9\] is no mapping"),
        ({"thresholds": {"2": 1.5}}, "exit is damaged: .*thresholds.2"),
        ({"thresholds": {"two": 0.5}}, "exit is damaged: .*two"),
        ({"measure": 3}, "exit is damaged: .*measure"),
        ({"settings": {}}, "exit: None is no mapping"),
        ({"settings": {"exit": {"mode": "full"}}}, "settings.exit: exits is missing, or too much"),
    ],
    ids=str,
)
def test_damage_is_named(file: Path, change: dict[str, Any], message: str) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FieldError, match=f"^inference.thresholds_file: {file}: {message}"):
        read_thresholds(file)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, "\x00"], ids=["", "[]", "null", "{", "deep", "0"]
)
def test_any_other_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(FieldError, match=r"inference\.thresholds_file: "):
        read_thresholds(file)


def test_a_file_that_is_not_there_and_a_folder_that_is_none(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"cannot be read as JSON .*No such file"):
        read_thresholds(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"thresholds\.json/thresholds\.json: "):
        write_thresholds(file / "thresholds.json", "", ExitParams(), SamplingParams(), {})
