"""Tokens to text in pieces: whole characters, stop strings, and what it costs."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from helpers.tokenizers import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.inference.text import Detokenizer, TextStream
from megatron_ee.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from megatron_ee.tokenizer.huggingface import HuggingFaceTokenizer

BYTES = ByteTokenizer()
EURO, GRIN = "€".encode(), "😀".encode()


def _huggingface(definition: bytes) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer({"tokenizer.json": definition}, where="here")


BPE = _huggingface(train_bpe(TEXTS, 320))


def _with_merges(*merges: tuple[bytes, bytes]) -> HuggingFaceTokenizer:
    """A byte-level BPE with tokens of our choice, which may begin and end within characters."""
    definition = json.loads(train_bpe([""], 257))
    vocabulary = definition["model"]["vocab"]
    spelled = dict(zip(_alphabet(), range(256), strict=True))
    names = {number: name for name, number in spelled.items()}
    for left, right in merges:
        pair = ["".join(names[byte] for byte in part) for part in (left, right)]
        definition["model"]["merges"].append(pair)
        vocabulary["".join(pair)] = len(vocabulary)
    return _huggingface(json.dumps(definition).encode())


def _alphabet() -> list[str]:
    """How byte-level tokenizers spell each byte: printable ones as they are, others from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def byte_fallback() -> HuggingFaceTokenizer:
    """A tokenizer of Llama 2's kind: characters that are no token are spelled in bytes, invalid ones one by one."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    vocabulary = {
        "</s>": 0,
        "<unk>": 1,
        "▁a": 2,
        "▁": 3,
        "a": 4,
        **{f"<0x{byte:02X}>": 5 + byte for byte in range(256)},
    }
    library = Library(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["</s>"])
    return _huggingface(library.to_str().encode())


class Watched:
    """A tokenizer that notes how many tokens it is asked to decode at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.asked = tokenizer, [0]

    def decode(self, tokens: list[int]) -> str:
        self.asked.append(len(tokens))
        return self._tokenizer.decode(tokens)


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    watched = Watched(tokenizer)
    detokenizer = Detokenizer(watched)  # type: ignore[arg-type]
    pieces = [*map(detokenizer.add, tokens), detokenizer.finish()]
    assert max(watched.asked) <= 13 and len(watched.asked) <= 4 * len(tokens) + 1, "its cost grows with the text"
    return pieces


TORN = st.sampled_from([*EURO, *GRIN, 0xC3, 0xA9, 0x41, 0xFF, 0xED, 0xA0, 0xF4, 0x90, 0xC0, BYTES.eod, BYTES.pad])


@given(st.lists(st.integers(0, 257) | TORN, max_size=80))
def test_pieces_of_any_bytes_join_to_the_whole(tokens: list[int]) -> None:
    assert "".join(_pieces(BYTES, tokens)) == BYTES.decode(tokens)


@given(st.lists(st.integers(0, 319), max_size=60))
def test_pieces_of_any_tokens_join_to_the_whole(tokens: list[int]) -> None:
    assert "".join(_pieces(BPE, tokens)) == BPE.decode(tokens)


MISALIGNED = _with_merges((EURO[:1], EURO[1:2]), (EURO[2:], EURO[:1]), (EURO[2:] + EURO[:1], EURO[1:2]))
BEGIN, END, END_AND_BEGIN = 257, 258, 259  # of euro signs: two bytes; the third and the first; the third and two


@given(st.lists(st.integers(BEGIN, END_AND_BEGIN) | st.integers(0, 256), max_size=60))
def test_tokens_that_begin_within_characters_join_too(tokens: list[int]) -> None:
    assert "".join(_pieces(MISALIGNED, tokens)) == MISALIGNED.decode(tokens)


def test_a_text_whose_tokens_never_end_with_a_character() -> None:
    pieces = _pieces(MISALIGNED, [BEGIN, *[END_AND_BEGIN] * 200])
    assert pieces == ["", *"€" * 200, "\ufffd"]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, MISALIGNED], ids=["bytes", "bpe", "misaligned"])
@given(text=st.text("aé€😀\ufffd\n\u0301", max_size=30))
def test_a_text_is_never_shown_with_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = _pieces(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_whole_characters_are_shown_at_once() -> None:
    assert _pieces(BYTES, BYTES.encode("a€b")) == ["a", "", "", "€", "b", ""]
    assert _pieces(BYTES, [*EURO[:2], BYTES.eod, EURO[2], BYTES.eod]) == ["", "", "", "€", "", ""]
    assert _pieces(BYTES, [*GRIN[:3], 0x41]) == ["", "", "", "\ufffdA", ""]
    assert _pieces(BYTES, [0x41, *GRIN[:3]]) == ["A", "", "", "", "\ufffd"]
    tokens = BPE.encode("early exits let a token leave")
    assert _pieces(BPE, tokens) == [*(BPE.decode([token]) for token in tokens), ""]


def test_bytes_that_are_no_text_are_shown_too_and_cost_no_more_and_more() -> None:
    assert "".join(_pieces(BYTES, [0xFF] * 300)) == "\ufffd" * 300
    assert "".join(_pieces(BYTES, [0xE2, 0x82] * 300)) == "\ufffd" * 300
    assert _pieces(BYTES, [0xFF] * 5) == ["", "", "", "\ufffd", "\ufffd", "\ufffd" * 3]
    assert "".join(_pieces(BYTES, [0xF0, *[BYTES.eod] * 300, *GRIN[1:]])) == "😀"


def test_byte_fallback(byte_fallback: HuggingFaceTokenizer) -> None:
    def spelled(text: str) -> list[int]:
        return [5 + byte for byte in text.encode()]

    assert _pieces(byte_fallback, [2, 4, *spelled("😀é"), 2, 0]) == [" a", "a", "", "", "", "😀", "", "é", " a", "", ""]
    lone = 5 + 0xFF
    assert "".join(_pieces(byte_fallback, [4, lone, 4, *spelled("€")])) == "a\ufffda€"
    assert "".join(_pieces(byte_fallback, [*spelled("é"), lone, 4])) == "é\ufffda", "a shown character is taken back"


def test_byte_fallback_finds_characters_again_in_a_long_run_that_is_no_text(
    byte_fallback: HuggingFaceTokenizer,
) -> None:
    """It marks each byte of the run, but that has to end some time."""
    tokens = [5 + byte for byte in b"\xff" + EURO * 8]
    assert "".join(_pieces(byte_fallback, tokens)) == "\ufffd" * 13 + "€" * 4
    for after in ("€", ""):
        cut = [5 + byte for byte in b"\xff" + EURO * 4 + after.encode()]
        assert "".join(_pieces(byte_fallback, [*cut, 4])) == "\ufffd" * 13 + after + "a"
    run = [5 + byte for byte in b"\xff" + EURO * 3 + GRIN]  # its last 13 bytes alone are text
    assert "".join(_pieces(byte_fallback, [*run, 4])) == byte_fallback.decode([*run, 4]) == "\ufffd" * 14 + "a"


@given(st.lists(st.sampled_from([2, 3, 4, *(5 + byte for byte in EURO + GRIN), 5 + 0xFF]), max_size=80))
def test_byte_fallback_never_loses_its_place(byte_fallback: HuggingFaceTokenizer, tokens: list[int]) -> None:
    """Bytes that are no text may be marked by more or fewer signs, but all that is between them comes out."""
    text, whole = "".join(_pieces(byte_fallback, tokens)), byte_fallback.decode(tokens)
    assert text.replace("\ufffd", "").count("a") == whole.count("a")
    assert text.count(" ") == whole.count(" ")


class Words:
    """Tokens that are any strings."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def decode(self, tokens: list[int]) -> str:
        return "".join(self._words[token] for token in tokens)


def _stream(words: Sequence[str], stops: Sequence[str], *, min_new_tokens: int = 0) -> tuple[list[str], str | None]:
    """What each token shows, up to the one that completes a stop string or to the end; and which that was."""
    stream = TextStream(Words(words), stops, min_new_tokens=min_new_tokens)  # type: ignore[arg-type]
    pieces = []
    for token in range(len(words)):
        pieces.append(stream.add(token))
        if stream.stop is not None:
            assert stream.finish() == ""
            return pieces, stream.stop
    return [*pieces, stream.finish()], stream.stop


def _splits(text: str) -> Iterator[list[str]]:
    for cuts in product((False, True), repeat=len(text) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(text)]
        yield [text[start:end] for start, end in pairwise(places)]


def _expected(text: str, stops: Sequence[str]) -> tuple[str, str | None, int]:
    """The text before the first stop string to be complete, that (the longest of several), and where it ends."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop, end
    return text, None, len(text)


def _check(words: Sequence[str], stops: Sequence[str]) -> None:
    text = "".join(words)
    shown, stop, end = _expected(text, stops)
    pieces, found = _stream(words, stops)
    assert ("".join(pieces), found) == (shown, stop)
    if stop is not None:
        used = "".join(words[: len(pieces)])
        assert len(used) >= end > len(used) - len(words[len(pieces) - 1]), "not the token that completes it"
    for number in range(1, len(words) if stop is None else len(pieces)):
        so_far, given = "".join(words[:number]), "".join(pieces[:number])
        beginnings = [size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])]
        assert given == so_far[: len(so_far) - max(beginnings, default=0)], "held back too much or too little"


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("ab\nENDxyz", ["END"]),
        ("aENENDx", ["END", "ENDx"]),
        ("aabaabaac", ["aabaac"]),
        ("abcdef", ["abcdef", "cd"]),
        ("xabcd", ["bcd", "abcd", "cdz"]),
        ("no stop", ["stopped", "z"]),
    ],
)
def test_a_stop_string_is_found_at_every_split(text: str, stops: list[str]) -> None:
    for words in _splits(text):
        _check(words, stops)


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_any_stop_strings_of_any_text(words: list[str], stops: list[str]) -> None:
    _check(words, stops)


def test_a_stop_string_ends_nothing_before_the_least_number_of_tokens() -> None:
    words = ["a", "ST", "OP", "b", "S", "TOP", "c"]
    assert _stream(words, ["STOP"], min_new_tokens=3) == (["a", "", ""], "STOP")
    assert _stream(words, ["STOP"], min_new_tokens=4) == (["a", "", "STOP", "b", "", ""], "STOP")
    assert _stream(words, ["STOP"], min_new_tokens=7) == (["a", "", "STOP", "b", "", "STOP", "c", ""], None)
    assert _stream(["aa", "a"], ["aa"], min_new_tokens=2) == (["a", ""], "aa")


def test_what_was_held_back_comes_at_the_end() -> None:
    assert _stream(["a", "EN"], ["END"]) == (["a", "", "EN"], None)
    assert _stream([], ["END"]) == ([""], None)


@given(
    st.text("aé€😀", max_size=12), st.text("aé€😀", min_size=1, max_size=3), st.sampled_from([BYTES, BPE, MISALIGNED])
)
def test_stop_strings_of_characters_of_several_tokens(text: str, stop: str, tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [stop])
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.add(token)
        if stream.stop:
            break
    assert shown + stream.finish() == _expected(text, [stop])[0]
    assert stream.stop == (stop if stop in text else None)


def test_half_a_character_at_the_end_may_complete_a_stop_string() -> None:
    stream = TextStream(BYTES, ["b\ufffd"])
    assert [stream.add(token) for token in (0x61, 0x62, 0xE2)] == ["a", "", ""]
    assert (stream.finish(), stream.stop) == ("", "b\ufffd")
