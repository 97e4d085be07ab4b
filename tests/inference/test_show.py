"""Text with depths, and what closes it."""

from typing import Any

import pytest

from megatron_ee.config import ExitParams
from megatron_ee.inference.request import Emission
from megatron_ee.inference.savings import Savings
from megatron_ee.inference.show import DepthPainter, Summary, closing_line, closing_table

EMISSIONS = [Emission(0, layer, 1.0) for layer in (3, 3, 12, 12)]


def _at(layer: int, draft_exit: int | None = None) -> Emission:
    return Emission(0, layer, 1.0, draft_exit=draft_exit)


def test_plain_text_where_there_is_no_terminal() -> None:
    painter = DepthPainter([3, 12], colour=False)
    assert painter.paint("größer", _at(3)) + painter.paint("!", _at(12)) == "größer!"
    assert painter.legend() == ""


def test_early_tokens_are_coloured_and_full_depth_is_not() -> None:
    painter = DepthPainter([3, 6, 12], colour=True)
    assert painter.paint("a", _at(3)) + painter.paint("b", _at(6)) + painter.paint("c", _at(12)) + painter.paint(
        "", _at(3)
    ) == ("\x1b[38;5;46ma\x1b[0m\x1b[38;5;196mb\x1b[0mc")
    assert painter.legend() == "\x1b[38;5;46mexit 3\x1b[0m  \x1b[38;5;196mexit 6\x1b[0m  full depth"


def test_a_drafted_token_has_the_colour_of_its_exit() -> None:
    painter = DepthPainter([3, 12], colour=True)
    assert painter.paint("a", _at(12, 3)) == painter.paint("a", _at(3)) != painter.paint("a", _at(12)) == "a"


def test_summary_counts_drafts() -> None:
    """Two cycles: of three drafted tokens two are accepted, and of one none."""
    drafted = [_at(12, 3), _at(12, 3), Emission(0, 12, 1.0, discarded=1), Emission(0, 12, 1.0, discarded=1)]
    line = "drafted 4, 50.0% of them accepted; 2.00 tokens for each of full depth's"
    assert Summary(drafted, seconds=2.0).line(12).endswith(f"2.0 tokens/s, {line}")
    all_in_vain = Summary(drafted[2:], seconds=1.0).drafts()
    assert all_in_vain == "2, 0.0% of them accepted; 1.00 tokens for each of full depth's"


def test_summary_counts_layers() -> None:
    summary = Summary(EMISSIONS, seconds=2.0)
    assert summary.line(12) == (
        "4 tokens, mean depth 7.50 of 12 layers, tokens by exit layer {3: 2, 12: 2}, 2.0 tokens/s"
    )


def test_the_closing_table_says_gains_and_costs() -> None:
    savings = Savings(
        bytes_at_full_depth=4_000_000_000,
        bytes_not_read=-1_500_000,
        head_bytes=250_000,
        num_asked=4,
        arithmetic_saved=0.0,
        head_arithmetic=0.125,
    )
    lines = list(closing_table(Summary(EMISSIONS, seconds=2.0), savings, ExitParams(), num_texts=1, num_layers=12))
    assert lines == [
        "tokens                 4 in 1 text, 2.0 tokens/s",
        "mean depth             7.50 of 12 layers",
        "tokens by exit layer   3: 2, 12: 2",
        "layers not waited for  37.5%",
        "weight bytes not read  -0.0% of the layers', -1.5 MB of 4.0 GB (prompts too)",
        "exits' heads           asked 4 times; 250.0 kB read beyond full depth's (0.0%), 12.5% more arithmetic",
        "arithmetic saved       0.0% of the layers'",
        "Every position runs every layer in the end; saved are those that still waited when their text ended.",
    ]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_policy": "fill"}, "Every position runs every layer in the end"),
        ({"kv_policy": "propagate"}, "not exact"),
        ({"mode": "full", "kv_policy": "propagate"}, "Every token runs every layer."),
        ({"mode": "speculative", "kv_policy": "propagate"}, "Full depth has verified every token"),
        ({"mode": "dola"}, "the exits correct"),
    ],
)
def test_the_last_line_says_how_texts_were_decoded(settings: dict[str, Any], says: str) -> None:
    assert says in closing_line(ExitParams(**settings))
