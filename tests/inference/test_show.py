"""Text with depths, and the summary of what exits did."""

from megatron_ee.inference.request import Emission
from megatron_ee.inference.show import DepthPainter, Summary
from megatron_ee.tokenizer import ByteTokenizer


def _emit(text: str, layer: int) -> list[Emission]:
    return [Emission(token, layer, 1.0) for token in text.encode()]


def _paint(painter: DepthPainter, emissions: list[Emission]) -> str:
    return "".join(painter.paint(emission) for emission in emissions)


def test_plain_text_where_there_is_no_terminal() -> None:
    painter = DepthPainter(ByteTokenizer(), [3, 12], colour=False)
    assert _paint(painter, _emit("größer", 3) + _emit("!", 12)) == "größer!"
    assert painter.legend() == ""


def test_early_tokens_are_coloured_and_full_depth_is_not() -> None:
    painter = DepthPainter(ByteTokenizer(), [3, 6, 12], colour=True)
    assert _paint(painter, [*_emit("a", 3), *_emit("b", 6), *_emit("c", 12)]) == (
        "\x1b[38;5;46ma\x1b[0m\x1b[38;5;196mb\x1b[0mc"
    )
    assert painter.legend() == "\x1b[38;5;46mexit 3\x1b[0m  \x1b[38;5;196mexit 6\x1b[0m  full depth"


def test_a_character_of_several_tokens_appears_when_it_is_whole() -> None:
    painter = DepthPainter(ByteTokenizer(), [12], colour=False)
    first, second = (painter.paint(emission) for emission in _emit("ü", 12))
    assert (first, second) == ("", "ü")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    painter = DepthPainter(ByteTokenizer(), [12], colour=False)
    painted = "".join(painter.paint(Emission(token, 12, 1.0)) for token in [0xFF, 0xFF, 0xFF, 0xFF, 65])
    assert painted.endswith("A")
    assert set(painted[:-1]) == {"\ufffd"}


def test_summary_counts_layers() -> None:
    summary = Summary([*_emit("ab", 3), *_emit("cd", 12)], seconds=2.0)
    assert summary.mean_depth == 7.5
    assert summary.exits_used() == {3: 2, 12: 2}
    assert summary.line(12) == (
        "4 tokens, mean depth 7.50 of 12 layers, tokens by exit layer {3: 2, 12: 2}, 2.0 tokens/s"
    )
    assert Summary([], seconds=0.0).line(12) == "no tokens: the text ended at once"
