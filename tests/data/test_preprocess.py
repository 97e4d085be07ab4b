"""From text files to a dataset: what is counted, what is refused, and that workers don't matter."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import run_config, train
from helpers.tokenizers import TEXTS, write_bpe, write_bpe_folder

from megatron_ee.data.encoding import encode_in_order
from megatron_ee.data.indexed import read_index, read_tokens
from megatron_ee.data.preprocess import Job, preprocess, tokenizer_path
from megatron_ee.data.sources import read_records
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import open_tokenizer

LINES = [*(json.dumps({"text": f"{number} {TEXTS[number % 2]}"}) for number in range(40)), '{"text": "ü"}']


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def _documents(prefix: Path, tokenizer: str = "bytes") -> list[str]:
    opened = open_tokenizer(tokenizer)
    tokens, texts, start = read_tokens(prefix), [], 0
    for length in read_index(prefix).lengths.tolist():
        document = tokens[start : start + length].tolist()
        assert document[-1] == opened.eod
        texts.append(opened.decode(document[:-1]))
        start += length
    return texts


def test_every_kind_of_file_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": "third"}')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fourth"}'))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"fifth"))
    inputs = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.txt.gz")]
    summary = preprocess(Job(inputs, tmp_path / "new/out"))
    assert _documents(tmp_path / "new/out") == ["first\n", "second", "third", "fourth", "fifth"]
    assert (summary.num_documents, summary.num_bytes, summary.num_tokens, summary.skipped) == (5, 28, 33, {})


@pytest.mark.parametrize("kind", ["bytes", "file", "folder"])
def test_each_kind_of_tokenizer(tmp_path: Path, lines: Path, kind: str) -> None:
    tokenizer = {
        "bytes": lambda: "bytes",
        "file": lambda: str(write_bpe(tmp_path / "t.json")),
        "folder": lambda: str(write_bpe_folder(tmp_path / "t", eos_token="!")),
    }[kind]()
    summary = preprocess(Job([lines], tmp_path / "out", tokenizer=tokenizer))
    assert _documents(tmp_path / "out", tokenizer) == [json.loads(line)["text"] for line in LINES]
    assert summary.tokenizer == tokenizer


def test_a_trained_bpe_lies_beside_the_dataset(tmp_path: Path, lines: Path) -> None:
    summary = preprocess(Job([lines], tmp_path / "out", bpe_vocab_size=300))
    assert summary.tokenizer == str(tokenizer_path(tmp_path / "out"))
    assert summary.vocab_size == open_tokenizer(summary.tokenizer).vocab_size == 300
    assert _documents(tmp_path / "out", summary.tokenizer) == [json.loads(line)["text"] for line in LINES]
    names = ["lines.jsonl", "out.bin", "out.idx", "out.meta.json", "out.tokenizer.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("bpe_vocab_size", [None, 300])
def test_workers_change_nothing(tmp_path: Path, lines: Path, bpe_vocab_size: int | None) -> None:
    for num_workers in (1, 2):
        (tmp_path / str(num_workers)).mkdir()
        job = Job([lines], tmp_path / f"{num_workers}/out", bpe_vocab_size=bpe_vocab_size, num_workers=num_workers)
        preprocess(job)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def test_batches_come_in_order_however_small(lines: Path) -> None:
    def encoded(num_workers: int) -> list[Any]:
        batches = encode_in_order(read_records([lines]), "bytes", "text", num_workers=num_workers, batch_bytes=1)
        return [batch.tokens.tolist() for batch in batches]

    assert encoded(2) == encoded(1)
    assert len(encoded(1)) == len(LINES)


def test_lines_without_a_text_are_counted_by_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"tex\n{"text": 7}\n\xff\n[]\n\n{"text": ""}\n{"text": "two"}\n{"text"\n')
    for num_workers in (1, 2):
        summary = preprocess(Job([path], tmp_path / "out", num_workers=num_workers, overwrite=True))
        found = {kind: (many.count, many.first) for kind, many in summary.skipped.items()}
        assert found == {
            "empty": (3, f"{path}:2"),
            "not JSON": (2, f"{path}:3"),
            "'text' is no string": (1, f"{path}:4"),
            "not UTF-8": (1, f"{path}:5"),
            "no JSON object": (1, f"{path}:6"),
        }
        assert _documents(tmp_path / "out") == ["one", "two"]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("bpe_vocab_size", [None, 300])
def test_a_missing_key_leaves_nothing(
    tmp_path: Path, lines: Path, num_workers: int, bpe_vocab_size: int | None
) -> None:
    lines.write_text(lines.read_text() + '{"content": "b"}\n')
    job = Job([lines], tmp_path / "out", num_workers=num_workers, bpe_vocab_size=bpe_vocab_size)
    with pytest.raises(UserError) as caught:
        preprocess(job)
    assert str(caught.value) == f"{lines}:{len(LINES) + 1}: --json-key: no 'text' among 'content'"
    assert [path.name for path in tmp_path.iterdir()] == [lines.name]


def test_an_input_without_documents_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n{\n")
    with pytest.raises(UserError) as caught:
        preprocess(Job([path], tmp_path / "out", bpe_vocab_size=300))
    said = f"--output: no document in the input: 1 empty (first: {path}:1), 1 not JSON (first: {path}:2)"
    assert str(caught.value) == said
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_that_is_damaged_in_the_middle_leaves_nothing(tmp_path: Path, lines: Path) -> None:
    whole = gzip.compress(lines.read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read \(Compressed file ended"):
        preprocess(Job([lines, tmp_path / "a.jsonl.gz"], tmp_path / "out", num_workers=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "lines.jsonl"]


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, lines: Path) -> None:
    job = Job([lines], tmp_path / "out")
    preprocess(job)
    with pytest.raises(UserError, match=r"^--output: .*out\.bin exists; take another name, or --overwrite$"):
        preprocess(job)
    (tmp_path / "a.txt").write_text("new")
    preprocess(Job([tmp_path / "a.txt"], tmp_path / "out", overwrite=True))
    assert _documents(tmp_path / "out") == ["new"]


def test_a_trained_tokenizer_is_not_replaced_either(tmp_path: Path, lines: Path) -> None:
    tokenizer_path(tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"^--output: .*out\.tokenizer\.json exists; take"):
        preprocess(Job([lines], tmp_path / "out", bpe_vocab_size=300))
    preprocess(Job([lines], tmp_path / "out"))
    assert tokenizer_path(tmp_path / "out").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(UserError, match=r"^--output: .*lines\.jsonl/out: cannot be written \("):
        preprocess(Job([lines], lines / "out"))


def test_a_missing_input_is_found_first(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: cannot be read \(No such file or directory\)$"):
        preprocess(Job([lines, tmp_path / "none.txt"], tmp_path / "out"))
    with pytest.raises(UserError, match=r": cannot be read \(Is a directory\)$"):
        preprocess(Job([lines, tmp_path], tmp_path / "out"))


def test_a_model_trains_on_what_was_written(tmp_path: Path, lines: Path, ranks: RankPool) -> None:
    summary = preprocess(Job([lines], tmp_path / "words", bpe_vocab_size=300))
    config = run_config(tmp_path, data={"tokenizer": summary.tokenizer})
    (trained,) = ranks.run(1, train, config)
    losses = [trained["figures"][step]["train/exit_8/loss"] for step in (1, 6)]
    assert losses[1] < losses[0]
    assert trained["parameters"]["embedding.weight"].shape[0] == 320
