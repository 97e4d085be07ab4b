"""The tokenizer that needs no file."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.tokenizer import BYTES, ByteTokenizer, open_tokenizer, padded_vocab_size


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.eod, tokenizer.pad} & set(tokens)


def test_specials_are_no_text_and_half_a_character_is_marked() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("größer"), tokenizer.eod, tokenizer.pad]) == "größer"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_it_is_opened_by_name_and_its_vocabulary_is_padded() -> None:
    tokenizer = open_tokenizer(BYTES)
    assert (tokenizer.name, dict(tokenizer.files())) == ("bytes", {})
    assert padded_vocab_size(tokenizer) == 320


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_join_to_the_whole(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert [token for piece in tokenizer.pieces(text, 3) for token in tokenizer.encode(piece)] == tokenizer.encode(text)
