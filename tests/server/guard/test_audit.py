"""The audit file: one line an event, that nobody can forge, and nothing fatal once the server runs."""

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.errors import FieldError
from megatron_ee.server.guard.audit import AuditLog


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("megatron_ee")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, clock=lambda: 12.3456)
    audit.note("out_of_bounds", client="a", request="r1", field="n", value=17)
    assert path.read_text() == (
        '{"time": 12.346, "event": "out_of_bounds", "request": "r1", "client": "a", "field": "n", "value": 17}\n'
    )  # at once
    AuditLog(path).note("refused", client="b", request="r2")
    assert [line["client"] for line in lines(path)] == ["a", "b"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@given(text=st.text(), number=st.floats())
def test_no_value_makes_a_line_of_its_own(text: str, number: float) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "audit.jsonl"
        audit = AuditLog(path)
        audit.note(text, client=text, request=text + "\n{}\r\n", field=text, value=number)
        audit.note("next", client="a", request="r")
        audit.close()
        first, second = path.read_bytes().splitlines()
    json.loads(first, parse_constant=pytest.fail)
    assert json.loads(second)["event"] == "next"


def test_what_is_long_is_cut(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.note("event", client="a", request="r", field="x" * 10**6)
    assert len((tmp_path / "audit.jsonl").read_text()) < 400


def test_a_file_that_was_moved_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path)
    audit.note("one", client="a", request="r")
    path.rename(tmp_path / "audit.1")
    audit.note("two", client="a", request="r")
    path.unlink()
    audit.note("three", client="a", request="r")
    assert [line["event"] for line in lines(tmp_path / "audit.1")] == ["one"]
    assert [line["event"] for line in lines(path)] == ["three"]
    assert (audit.lost, stat.S_IMODE(path.stat().st_mode)) == (0, 0o600)


@pytest.mark.parametrize("where", ["none/audit.jsonl", "", "a\0b"])
def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path, where: str) -> None:
    with pytest.raises(FieldError, match="cannot be written") as error:
        AuditLog(f"{tmp_path}/{where}")
    assert error.value.field == "serving.audit"


def test_later_it_is_counted(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    audit = AuditLog(folder / "audit.jsonl")
    (folder / "audit.jsonl").rename(tmp_path / "moved")
    folder.rmdir()
    for _ in range(3):
        audit.note("lost", client="a", request="r")
    folder.mkdir()
    audit.note("written", client="a", request="r")
    assert audit.lost == 3
    assert [line["event"] for line in lines(folder / "audit.jsonl")] == ["written"]
    assert len({record.getMessage() for record in warnings.records}) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_disk_is_not_fatal() -> None:
    audit = AuditLog("/dev/full")
    for _ in range(2):
        audit.note("lost", client="a", request="r")
    assert audit.lost == 2
    audit.close()
    audit.note("after", client="a", request="r")
    assert audit.lost == 2


def test_none_is_no_file() -> None:
    AuditLog(None).note("event", client="a", request="r")
