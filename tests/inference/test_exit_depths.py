"""The file of depths: read back as written, and refused by name where it is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config import ExitParams
from megatron_ee.errors import FieldError, UserError
from megatron_ee.inference.exit_depths import read_depths, write_depths

GOOD = {"version": 1, "num_layers": 16, "tokens": {"4": 400, "8": 200, "12": 100, "16": 300}}
EXITS = (4, 8, 12)


def test_a_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "depths.json"
    for tokens in ({16: 3, 4: 5}, {12: 1}):
        write_depths(path, tokens, num_layers=16, exit=ExitParams(threshold=0.7))
        assert list(read_depths(path, EXITS, 16).items()) == sorted(tokens.items())
    assert [file.name for file in path.parent.iterdir()] == ["depths.json"]
    assert json.loads(path.read_text())["exit"]["threshold"] == 0.7


def test_what_is_not_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "folder", tmp_path / "file" / "depths.json"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            write_depths(path, {16: 1}, num_layers=16, exit=ExitParams())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, ": version: 2, not 1"),
        ({"version": True}, ": version: True, not 1"),
        ({"num_layers": 12}, ": num_layers: 12, not 16"),
        ({"num_layers": None}, ": num_layers: None, not 16"),
        ({"tokens": [1, 2]}, ": tokens: [1, 2], not a mapping from layers to numbers of tokens"),
        ({"tokens": {"5": 1}}, ": tokens.5: the model has no exit there, only after layers [4, 8, 12, 16]"),
        ({"tokens": {"04": 1}}, ": tokens.04: the model has no exit there, only after layers [4, 8, 12, 16]"),
        ({"tokens": {"4": 1, "8": -1}}, ": tokens.8: -1 is no number of tokens"),
        ({"tokens": {"4": 1.0}}, ": tokens.4: 1.0 is no number of tokens"),
        ({"tokens": {"4": True}}, ": tokens.4: True is no number of tokens"),
        ({"tokens": {"4": float("nan")}}, ": tokens.4: nan is no number of tokens"),
        ({"tokens": {"4": 0, "16": 0}}, ": tokens: there is none"),
        ({"tokens": {}}, ": tokens: there is none"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "depths.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(FieldError) as caught:
        read_depths(path, EXITS, 16)
    assert str(caught.value) == f"inference.parallel.depths: {path}{said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", ": version: None, not 1"),
        ("3", ": version: None, not 1"),
    ],
    ids=["nothing", "half", "no text", "too deep", "a list", "a number"],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "depths.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FieldError, match=re.escape(said)):
        read_depths(path, EXITS, 16)


@pytest.mark.parametrize(
    ("name", "said"), [("none", "does not exist"), (".", "cannot be read"), ("\0", "cannot be read")]
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        read_depths(tmp_path / name, EXITS, 16)
