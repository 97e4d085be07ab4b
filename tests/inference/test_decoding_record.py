"""The record of a pipeline: noted, read back as written, and refused by name where it is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.errors import UserError
from megatron_ee.inference.decoding_record import Recorder, RecordError, read_record, write_record
from megatron_ee.inference.scheduling.fronts import LaunchPlan


def _recorder() -> Recorder:
    recorder = Recorder()
    recorder.begin((3, 8))
    recorder.note(0, LaunchPlan(0, 3, {0: 4, 2: 1}), (0.0, 1.5), (100.25, 100.5))
    recorder.note(1, LaunchPlan(5, 8, {}, {0: 2}), (1.5, 2.0), None)
    return recorder


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    record = _recorder().record
    path = tmp_path / "new" / "record.json"
    for _ in range(2):
        write_record(path, record)
        assert read_record(path) == record
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    first, second = record.launches
    assert (first.tokens, first.rows, first.filled, first.seconds) == (2, 5, 0, (0.0, 0.25)), "from the record's begin"
    assert (second.tokens, second.rows, second.filled, second.seconds) == (0, 0, 2, None)
    assert record.has("virtual") and not record.has("seconds")
    assert [len(lane) for lane in record.lanes("seconds")] == [1, 0]


def test_pipelines_that_follow_each_other_do_so_on_the_virtual_clock() -> None:
    recorder = _recorder()
    recorder.begin((3, 8))
    recorder.note(0, LaunchPlan(0, 3, {0: 1}), (0.0, 1.0), None)
    assert recorder.record.launches[-1].virtual == (2.0, 3.0)


def test_a_file_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "record.json"):
        with pytest.raises(UserError, match=str(path)):
            write_record(path, _recorder().record)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (("version",), 2, "version: 2; this release reads 1"),
        (("stops",), [3, 3], "stops: [3, 3] do not ascend"),
        (("stops",), 8, "stops: 8 is no list"),
        (("stops",), [], "stops: [] do not ascend, or there are none"),
        (("more",), 1, "the record: more is unknown"),
        (("launches",), [7], "launches[0]: 7 is no launch"),
        (("launches", 1), {"stage": 0}, "launches[1]: filled is missing"),
        (("launches", 1, "stage"), 2, "launches[1].stage: there is no stage 2, only 2"),
        (("launches", 1, "layers"), [2, 8], "launches[1].layers: [2, 8] are not of stage 1"),
        (("launches", 1, "layers"), [8], "launches[1].layers: [8] is no list of 2"),
        (("launches", 0, "rows"), True, "launches[0].rows: True is no whole number of 0 or more"),
        (("launches", 0, "rows"), 1, "launches[0].rows: 2 tokens cannot have 1 rows"),
        (("launches", 1, "filled"), 0, "launches[1].rows: 0 tokens cannot have 0 rows, with 0 filled"),
        (("launches", 0, "virtual"), [2, 1], "launches[0].virtual: [2, 1] does not end after it begins"),
        (("launches", 0, "virtual"), ["a", 1], "launches[0].virtual: 'a' is no time"),
        (("launches", 0, "seconds"), [0], "launches[0].seconds: [0] is no list of 2"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: tuple[Any, ...], value: Any, said: str) -> None:
    path = tmp_path / "record.json"
    write_record(path, _recorder().record)
    content = json.loads(path.read_text())
    place = content
    for name in field[:-1]:
        place = place[name]
    place[field[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert said in str(caught.value)


def test_launches_of_a_stage_come_one_after_the_other(tmp_path: Path) -> None:
    recorder = _recorder()
    recorder.note(0, LaunchPlan(0, 3, {0: 1}), (1.0, 2.0), None)
    write_record(tmp_path / "record.json", recorder.record)
    with pytest.raises(RecordError, match="begins before the one before it on stage 0 has ended"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"version": 1}'])
def test_what_is_no_record_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RecordError, match=r"record\.json"):
        read_record(tmp_path / "record.json")
