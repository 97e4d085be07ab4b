"""The text of the results: books, split by title into those that are trained on and those that no training sees.

The dataset holds the books for training first, then those for validation and for test, so that `data.split` can name
their numbers. The BPE is learned from the books for training alone.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_ee.data.corpus import documents
from megatron_ee.data.preprocess import Job, preprocess, tokenizer_path
from megatron_ee.errors import UserError

VOCAB_SIZE = 8192
QUICK_VOCAB_SIZE = 512
VALIDATION = (
    "A Christmas Carol",
    "Northanger Abbey",
    "Silas Marner",
    "The Narrative of Arthur Gordon Pym of Nantucket",
)
TEST = ("Around the Moon", "Hard Times")
"""Of the last author nothing is trained on, of the others other books are."""
PROMPT_CHARACTERS = 200
NUM_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class Corpus:
    """
    Attributes:
        prefix: of the .bin/.idx pair.
        split: documents for training, validation and test.
        held_out: titles by part.
    """

    prefix: Path
    split: tuple[int, int, int]
    held_out: Mapping[str, Sequence[str]]

    @property
    def tokenizer(self) -> Path:
        return tokenizer_path(self.prefix)

    @property
    def prompts(self) -> Path:
        """Beginnings from the texts for test, one a line: the file for `--prompts`."""
        return self.prefix.with_name("prompts.jsonl")

    @property
    def overrides(self) -> list[str]:
        """What configs/results need to be told of it."""
        split = ", ".join(map(str, self.split))
        return [f"data.dataset={self.prefix}", f"data.tokenizer={self.tokenizer}", f"data.split=[{split}]"]


def make_corpus(books: Path | None, folder: Path, *, quick: bool = False) -> Corpus:
    """Write the dataset, its tokenizer and the prompts, unless they are there.

    Args:
        quick: of the built-in corpus only a part, and a small vocabulary.
        books: a .jsonl, or .jsonl.gz, with `title` and `text` a line; None: the built-in corpus, whose last documents
            are held out.

    Raises:
        UserError: the books cannot be read, or one that is to be held out is not among them.
    """
    texts = _built_in(share=0.1 if quick else 1.0) if books is None else _read(books)
    train, validation, test = parts = _split(texts, books)
    prefix = folder / ("corpus" if books is None else "books")
    corpus = Corpus(prefix, (len(train), len(validation), len(test)), {"validation": [*validation], "test": [*test]})
    if corpus.prompts.exists():
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    sources = [folder / f"{part}.jsonl" for part in ("train", "validation", "test")]
    for source, of_part in zip(sources, parts, strict=True):
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in of_part.values()))
    for_training = folder / f"{prefix.name}_train"
    learned = preprocess(
        Job(sources[:1], for_training, bpe_vocab_size=QUICK_VOCAB_SIZE if quick else VOCAB_SIZE, overwrite=True)
    )
    corpus.tokenizer.write_bytes(tokenizer_path(for_training).read_bytes())
    whole = preprocess(Job(sources, prefix, tokenizer=str(corpus.tokenizer), num_workers=2, overwrite=True))
    print(f"{prefix}: {learned.num_tokens:,} tokens to train on, {whole.num_tokens - learned.num_tokens:,} held out")
    corpus.prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in _prompts([*test.values()])))
    return corpus


def _read(path: Path) -> dict[str, str]:
    """Texts by title."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        return {record["title"]: record["text"] for record in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a .jsonl of objects with `title` and `text`: {error!r}") from error


def _built_in(share: float) -> dict[str, str]:
    return {f"file {number}": text for number, text in enumerate(islice(documents(), 0, None, round(1 / share)))}


def _split(texts: dict[str, str], books: Path | None) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """For training, validation and test."""
    validation: Sequence[str] = VALIDATION
    test: Sequence[str] = TEST
    if books is None:
        titles = tuple(texts)
        tenth = max(1, len(titles) // 20)
        validation, test = titles[-2 * tenth : -tenth], titles[-tenth:]
    if missing := [title for title in (*validation, *test) if title not in texts]:
        raise UserError(f"{books}: {missing[0]!r}, which is to be held out, is not there")
    train = {title: text for title, text in texts.items() if title not in {*validation, *test}}
    return train, {title: texts[title] for title in validation}, {title: texts[title] for title in test}


def _prompts(texts: Sequence[str]) -> list[str]:
    """Evenly spread over the texts, each from the beginning of a word."""
    whole = "\n\n".join(texts)
    step = len(whole) // (NUM_PROMPTS + 1)
    starts = [whole.index(" ", step * number) + 1 for number in range(1, NUM_PROMPTS + 1)]
    return [whole[start : start + PROMPT_CHARACTERS].rsplit(" ", 1)[0] for start in starts]
