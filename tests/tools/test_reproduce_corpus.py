"""Books are split by title: no text that is measured on is ever trained on."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ee.data.indexed import bin_path
from megatron_ee.errors import UserError
from megatron_ee.tokenizer import open_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import reproduce_corpus
from reproduce_corpus import TEST, VALIDATION, make_corpus

WORDS = ["the", "ship", "sailed", "over", "a", "cold", "sea", "and", "nobody", "knew", "where", "it", "would", "land"]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "books.jsonl.gz"
    titles = ["One", *TEST, "Two", *VALIDATION, "Three"]
    texts = {title: " ".join([title, *WORDS * 12, f"end of {title}"]) for title in titles}
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"title": title, "text": text}) + "\n" for title, text in texts.items())
    return path


def test_held_out_books_come_last_and_their_numbers_are_the_split(books: Path, tmp_path: Path) -> None:
    corpus = make_corpus(books, tmp_path, quick=True)
    assert corpus.split == (3, len(VALIDATION), len(TEST))
    assert corpus.held_out == {"validation": list(VALIDATION), "test": list(TEST)}
    text = _text(corpus)
    places = [text.index(f"end of {title}") for title in ("One", "Two", "Three", *VALIDATION, *TEST)]
    assert places == sorted(places)


def test_the_tokenizer_never_saw_what_is_held_out(books: Path, tmp_path: Path) -> None:
    """Its bytes are those of a BPE of the books for training alone."""
    corpus = make_corpus(books, tmp_path, quick=True)
    assert corpus.tokenizer.read_bytes() == (tmp_path / "books_train.tokenizer.json").read_bytes()
    assert "end of One" in (tmp_path / "train.jsonl").read_text()
    assert not any(title in (tmp_path / "train.jsonl").read_text() for title in (*VALIDATION, *TEST))


def test_prompts_are_of_the_books_for_test(books: Path, tmp_path: Path) -> None:
    corpus = make_corpus(books, tmp_path, quick=True)
    prompts = [json.loads(line)["prompt"] for line in corpus.prompts.read_text().splitlines()]
    assert len(prompts) == reproduce_corpus.NUM_PROMPTS
    assert all(prompt and len(prompt) <= reproduce_corpus.PROMPT_CHARACTERS for prompt in prompts)


def test_what_is_there_is_kept(books: Path, tmp_path: Path) -> None:
    corpus = make_corpus(books, tmp_path, quick=True)
    before = bin_path(corpus.prefix).stat().st_mtime_ns
    assert make_corpus(books, tmp_path, quick=True) == corpus
    assert bin_path(corpus.prefix).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"title": "One", "text": "x"}\n', "'A Christmas Carol', which is to be held out, is not there"),
        ('{"text": "x"}\n', "not a .jsonl of objects with `title` and `text`: KeyError('title')"),
        ("[1\n", "not a .jsonl of objects with `title` and `text`: JSONDecodeError"),
    ],
)
def test_other_books_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        make_corpus(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert not (tmp_path / "out").exists()


def _text(corpus: reproduce_corpus.Corpus) -> str:
    tokens = np.fromfile(bin_path(corpus.prefix), dtype=np.uint16)
    return open_tokenizer(str(corpus.tokenizer)).decode(tokens.tolist())
