"""Documents in files: text, lines of JSON, compressed, damaged."""

import gzip
from pathlib import Path

import pytest

from megatron_ee.data.sources import Record, UnusableError, read_records, text_of
from megatron_ee.errors import UserError


def _texts(*paths: Path) -> list[str]:
    return [text_of(record, "text") for record in read_records(paths)]


LINES = b'\xef\xbb\xbf{"text": "one\\n", "id": 1}\n{"id": 2, "text": "zw\xc3\xb6lf"}\r\n{"text": "last"}'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.jsonl.gz", "a.v1.jsonl.gz"])
def test_lines_of_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    assert _texts(tmp_path / name) == ["one\n", "zwölf", "last"]
    places = [record.place for record in read_records([tmp_path / name])]
    assert places == [f"{tmp_path / name}:{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.md"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf{one}\r\n\ntwo\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert _texts(tmp_path / name) == ["{one}\r\n\ntwo\n"]


def test_progress_adds_up_to_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES * 1000))
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    steps: list[int] = []
    list(read_records(paths, steps.append))
    assert sum(steps) == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"\n", "empty"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"text": null}', "'text' is no string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
    ids=["blank", "blank text", "cut", "deep", "list", "null", "bytes", "surrogate"],
)
def test_kinds_of_lines_without_a_text(raw: bytes, kind: str) -> None:
    with pytest.raises(UnusableError) as caught:
        text_of(Record(raw, "a.jsonl:7", True), "text")
    assert str(caught.value) == kind


def test_a_missing_key_is_an_error_that_lists_the_keys() -> None:
    with pytest.raises(UserError) as caught:
        text_of(Record(b'{"content": "a", "texts": "b"}', "a.jsonl:7", True), "text")
    assert str(caught.value) == "a.jsonl:7: --json-key: no 'text' among 'content', 'texts'; did you mean 'texts'?"
    with pytest.raises(UserError, match=r"^a:1: --json-key: no 'text' among no keys$"):
        text_of(Record(b"{}", "a:1", True), "text")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.txt", None, "No such file or directory"),
        ("a.txt.gz", b"plain", "Not a gzipped file (b'pl')"),
        ("a.jsonl.gz", gzip.compress(LINES * 99)[:-20], "Compressed file ended before the end-of-stream marker"),
        ("b.jsonl.gz", gzip.compress(LINES)[:10] + b"\xff" * 40, "Error -3 while decompressing data"),
    ],
    ids=["missing", "not compressed", "cut", "damaged"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_records([path]))
    assert str(caught.value).startswith(f"{path}: cannot be read ({reason}")
