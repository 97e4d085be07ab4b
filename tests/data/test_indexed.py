"""Megatron's indexed dataset: the same bytes as megatron-core's own writer, whole or absent, damage found."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ee.data.indexed import (
    DatasetError,
    bin_path,
    index_path,
    read_index,
    read_meta,
    read_tokens,
    token_type,
    write_aside,
    write_indexed,
)
from megatron_ee.tokenizer import ByteTokenizer


def test_documents_end_with_their_own_token_and_read_back(tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "two"
    write_indexed(prefix, ["abc", "ü"], ByteTokenizer())
    assert read_tokens(prefix).tolist() == [97, 98, 99, 256, 0xC3, 0xBC, 256]
    assert read_index(prefix).lengths.tolist() == [4, 3]
    assert read_meta(prefix) == {"tokenizer": "bytes", "vocab_size": 258, "documents": 2, "tokens": 7}
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["two.bin", "two.idx", "two.meta.json"]


@pytest.mark.parametrize("vocab_size", [258, 65536, 65537])
def test_megatron_cores_own_writer_makes_the_same_files(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    generator = np.random.default_rng(0)
    documents = [generator.integers(vocab_size, size=size) for size in (5, 1, 300)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_type(vocab_size).type)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with write_aside(tmp_path / "ours", tokenizer) as writer:
        writer.add(documents[0], [5])
        writer.add(np.concatenate(documents[1:]), [1, 300])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[number].tolist() for number in range(3)] == [document.tolist() for document in documents]


def _breaking() -> Iterator[str]:
    yield "abc"
    raise OSError("disk")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"):
        write_indexed(tmp_path / "broken", _breaking(), ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_what_it_would_have_replaced(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", ["old"], ByteTokenizer())
    with pytest.raises(OSError, match="disk"):
        write_indexed(tmp_path / "a", _breaking(), ByteTokenizer())
    assert bytes(read_tokens(tmp_path / "a")[:3].tolist()) == b"old"


def test_a_document_beyond_the_format_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DatasetError, match=r"^a document of 2147483648 tokens; the format takes 2147483647: split it$"),
        write_aside(tmp_path / "a", ByteTokenizer()) as writer,
    ):
        writer.add(np.zeros(0, dtype=np.uint16), [2**31])


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_damage_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with pytest.raises(DatasetError, match=r"a\.bin does not exist$"):
        read_index(prefix)
    write_indexed(prefix, ["abc", "de"], ByteTokenizer())
    _cut(bin_path(prefix), 12)
    with pytest.raises(DatasetError, match=r"a\.bin is cut short: a\.idx lists 7 tokens$"):
        read_index(prefix)
    _cut(index_path(prefix), 50)
    with pytest.raises(DatasetError, match=r"a\.idx is cut short$"):
        read_index(prefix)
    for content in (b"", b"something else that is longer than a header"):
        index_path(prefix).write_bytes(content)
        with pytest.raises(DatasetError, match=r"a\.idx is no index of a Megatron dataset$"):
            read_index(prefix)
    index_path(prefix).write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8))
    with pytest.raises(DatasetError, match=r"a\.idx lists no documents$"):
        read_index(prefix)
    (tmp_path / "a.meta.json").write_text("{")
    with pytest.raises(DatasetError, match=r"a\.meta\.json is damaged"):
        read_meta(prefix)


def test_a_dataset_of_another_tool_says_nothing_of_its_tokenizer(tmp_path: Path) -> None:
    write_indexed(tmp_path / "a", ["abc"], ByteTokenizer())
    (tmp_path / "a.meta.json").rename(tmp_path / "b.meta.json")
    assert read_meta(tmp_path / "a") == {}
    assert json.loads((tmp_path / "b.meta.json").read_text())["tokenizer"] == "bytes"
