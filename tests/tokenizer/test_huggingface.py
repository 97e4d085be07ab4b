"""Hugging Face tokenizers: from a file, from a folder, trained here; and what is wrong with some."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import TEXTS, write_bpe, write_bpe_folder
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.errors import UserError
from megatron_ee.tokenizer import NO_PAD, Tokenizer, open_tokenizer, train_bpe
from megatron_ee.tokenizer.huggingface import HuggingFaceTokenizer

TRAINED = train_bpe(TEXTS, 320)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("  \nab<|endoftext|>"))


def _tokenizer(definition: bytes = TRAINED, **settings: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer({"tokenizer.json": definition}, where="here", **settings)


BPE = _tokenizer()
BPE_IN_PIECES = _tokenizer(piece_size=3)


@given(ANY_TEXT)
def test_any_text_comes_back_and_never_ends_a_document(text: str) -> None:
    tokens = BPE.encode(text)
    assert BPE.decode(tokens) == text
    assert BPE.eod not in tokens


@given(ANY_TEXT)
def test_cutting_a_long_text_changes_nothing(text: str) -> None:
    assert BPE_IN_PIECES.encode(text) == BPE.encode(text)


@given(ANY_TEXT, ANY_TEXT)
def test_decoded_parts_join_to_the_whole(first: str, second: str) -> None:
    assert BPE.decode(BPE.encode(first) + BPE.encode(second)) == first + second


def test_a_text_that_spells_a_special_token_is_text() -> None:
    tokens = BPE.encode("a<|endoftext|>b")
    assert BPE.eod not in tokens
    assert BPE.decode([*tokens, BPE.eod]) == "a<|endoftext|>b"


def test_half_a_character_is_marked_until_it_is_whole() -> None:
    tokens = BPE.encode("é")
    assert len(tokens) == 2
    assert BPE.decode(tokens[:1]) == "\ufffd"
    assert BPE.decode(tokens) == "é"


def test_training_twice_gives_the_same_and_a_small_text_fewer_tokens() -> None:
    assert train_bpe(TEXTS, 320) == TRAINED
    assert (BPE.vocab_size, BPE.eod, BPE.pad) == (320, 0, NO_PAD)
    assert _tokenizer(train_bpe(["ab"], 5000)).vocab_size == 258


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--train-bpe: 256 must be above 256: every byte is a token$"):
        train_bpe(["a"], 256)


def test_limits_on_length_in_the_file_are_ignored() -> None:
    tree = json.loads(TRAINED)
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert _tokenizer(json.dumps(tree).encode()).encode(TEXTS[0]) == BPE.encode(TEXTS[0])


@pytest.fixture(scope="module")
def word_starts() -> Tokenizer:
    """A tokenizer of the SentencePiece kind: a mark before each word, which its decoder drops at a text's beginning."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {"</s>": 0, "<unk>": 1, "▁a": 2, "▁token": 3, "s": 4, "▁": 5}
    library = Library(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return _tokenizer(library.to_str().encode())


def test_a_word_in_mid_text_keeps_its_blank(word_starts: Tokenizer) -> None:
    assert word_starts.encode("a tokens") == [2, 3, 4]
    assert "a" + "".join(word_starts.decode([token]) for token in (3, 4, word_starts.eod)) == "a tokens"


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    first = open_tokenizer(str(write_bpe(tmp_path / "one.json")))
    again = open_tokenizer(str(write_bpe(tmp_path / "two.json")))
    other = open_tokenizer(str(write_bpe(tmp_path / "one.json", 321)))
    assert first.name == again.name != other.name
    assert first.name.startswith("hf-")


@pytest.mark.parametrize(
    ("settings", "eod", "pad"),
    [
        ({}, "<|endoftext|>", NO_PAD),
        ({"eos_token": "!"}, "!", NO_PAD),
        ({"eos_token": {"content": "!", "special": True}, "pad_token": "."}, "!", "."),
        ({"eos_token": "!", "pad_token": "!"}, "!", NO_PAD),
        ({"eos_token": None, "pad_token": "no token"}, "<|endoftext|>", NO_PAD),
    ],
    ids=["none", "eos", "both", "same", "null"],
)
def test_a_folder_names_its_special_tokens(tmp_path: Path, settings: Any, eod: str, pad: str | int) -> None:
    tokenizer = open_tokenizer(str(write_bpe_folder(tmp_path, **settings)))
    assert [tokenizer.eod] == (BPE.encode(eod) if len(eod) == 1 else [0])
    assert [tokenizer.pad] == (BPE.encode(pad) if isinstance(pad, str) else [pad])


def test_the_older_settings_file_is_read_too(tmp_path: Path) -> None:
    write_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "!"}')
    assert [open_tokenizer(str(tmp_path)).eod] == BPE.encode("!")


def test_its_files_are_the_same_tokenizer_again(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_bpe_folder(tmp_path / "one", eos_token="!", pad_token=".")))
    (tmp_path / "two").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "two" / name).write_bytes(content)
    copy = open_tokenizer(str(tmp_path / "two"))
    assert (copy.name, copy.eod, copy.pad) == (tokenizer.name, tokenizer.eod, tokenizer.pad)


def test_a_folder_without_a_tokenizer_json_is_converted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = json.loads(TRAINED)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    tokenizer = open_tokenizer(str(tmp_path))
    text = "early exits, größer"
    assert tokenizer.encode(text) == BPE.encode(text)
    assert tokenizer.encode(text) == transformers.AutoTokenizer.from_pretrained(str(tmp_path))(text)["input_ids"]
    assert tokenizer.eod == 0
    assert set(tokenizer.files()) == {"tokenizer.json", "tokenizer_config.json"}


def test_the_tokens_are_those_that_transformers_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_bpe_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXTS[1])["input_ids"] == open_tokenizer(str(tmp_path)).encode(TEXTS[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a/tokenizer.json", None, "data.tokenizer: '{path}' is neither 'bytes' nor the path of a tokenizer.json"),
        ("tokenizer.json", "{", "data.tokenizer: {path}: not a tokenizer ("),
        ("tokenizer.json", '{"version": "1.0"}', "data.tokenizer: {path}: not a tokenizer ("),
        ("other.json", "", "data.tokenizer: {path}: not a tokenizer ("),
    ],
    ids=["missing", "broken", "other json", "empty"],
)
def test_what_is_no_tokenizer_is_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(path))
    assert str(caught.value).startswith(message.format(path=path))


def test_a_tokenizer_without_an_end_of_document_is_named(tmp_path: Path) -> None:
    tree = json.loads(TRAINED)
    tree["added_tokens"] = []
    del tree["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"t\.json: no end-of-document token: neither an eos_token in .* nor one of <"):
        open_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"its settings name '<eos>' as eos_token, which is no token of it$"):
        open_tokenizer(str(write_bpe_folder(tmp_path / "f", eos_token="<eos>")))


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json, and transformers finds no tokenizer: "):
        open_tokenizer(str(tmp_path), field="--tokenizer")


@pytest.mark.parametrize("missing", ["tokenizers", "transformers"])
def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return real_import(name, *arguments, **named)

    if missing == "tokenizers":
        write_bpe(tmp_path / "tokenizer.json")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs Hugging Face's libraries: pip install 'megatron-ee\[hf\]'$"):
        open_tokenizer(str(tmp_path))
