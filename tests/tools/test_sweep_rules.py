"""Which setting a sweep calls the best: rules on cells made by hand, and how often chance passes for a finding."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import sweep_corrections  # noqa: E402
import sweep_speculation  # noqa: E402
import sweep_thresholds  # noqa: E402
from sweep_timing import Speed, deviations_needed, fastest, noise_of, speed_of  # noqa: E402

from megatron_ee.inference.completion import Completion  # noqa: E402
from megatron_ee.inference.request import Emission  # noqa: E402

RATIOS = st.floats(0.3, 3.0)


def _speed(median: float) -> Speed:
    return Speed(median, median * 0.9, median * 1.1)


@given(medians=st.lists(RATIOS, max_size=12), noise=st.floats(1.0, 1.5))
def test_the_fastest_is_above_the_noise_or_there_is_none(medians: list[float], noise: float) -> None:
    best = fastest({number: _speed(median) for number, median in enumerate(medians)}, noise)
    if best is None:
        assert all(median <= noise for median in medians)
    else:
        assert medians[best] == max(medians) > noise
        assert best == medians.index(max(medians)), "the first one of equals"


def test_of_settings_that_are_as_fast_as_full_depth_one_sweep_in_twenty_finds_one() -> None:
    """Normal noise, of which a ratio of two turns has twice; the deviation is itself an estimate, from 49 pairs."""
    generator = np.random.default_rng(0)
    rounds, settings, found = 7, 20, 0
    for _ in range(600):
        same = np.exp(generator.normal(0, 0.1, size=49))
        noise = noise_of(same.tolist(), rounds=rounds, settings=settings)
        medians = np.median(np.exp(generator.normal(0, 0.1, size=(settings, rounds))), axis=1)
        found += fastest({number: _speed(float(of)) for number, of in enumerate(medians)}, noise) is not None
    assert 0.02 <= found / 600 <= 0.09


def test_noise_by_hand() -> None:
    assert noise_of([1.0] * 9, rounds=5, settings=20) == 1.0
    slower, faster = (noise_of([ratio] * 9, rounds=5, settings=20) for ratio in (0.8, 1.25))
    assert slower == pytest.approx(faster), "faster or slower, it is as much noise"
    assert noise_of([1.25] * 9, rounds=20, settings=20) == pytest.approx(faster**0.5), "a quarter of the variance"
    assert noise_of([1.25] * 9, rounds=5, settings=40) > faster, "the best of more"
    assert deviations_needed(1) == pytest.approx(1.645, abs=1e-3)
    assert deviations_needed(20) == pytest.approx(2.807, abs=1e-3)
    speed = speed_of([1.0, 1.1, 1.2, 1.3, 9.0])
    assert (speed.median, speed.low) == (1.2, pytest.approx(1.04))


def _threshold(layer: int, threshold: float, speed: float, agreement: float) -> sweep_thresholds.Cell:
    return sweep_thresholds.Cell((layer,), threshold, _speed(speed), agreement, 4.0)


def test_the_best_threshold_agrees_often_enough() -> None:
    cells = [_threshold(2, 0.5, 1.9, 0.80), _threshold(2, 0.7, 1.4, 0.95), _threshold(4, 0.5, 1.3, 0.99)]
    assert sweep_thresholds.best_of(cells, 0.95, 1.05) is cells[1], "at least 0.95 is 0.95, too"
    assert sweep_thresholds.best_of(cells, 0.97, 1.05) is cells[2]
    assert sweep_thresholds.best_of(cells, 0.97, 1.30) is None
    assert "no setting with 97.0% of" in sweep_thresholds.verdict(cells, None, 0.97, 1.3)
    assert "exit 4 alone at threshold 0.5, 1.30x" in sweep_thresholds.verdict(cells, None, 0.97, 1.3)
    assert sweep_thresholds.best_of(cells, 1.0, 1.0) is None
    assert "The closest is exit 4 alone at threshold 0.5, with 99.0%" in sweep_thresholds.verdict(cells, None, 1.0, 1.0)


@given(
    cells=st.lists(
        st.builds(_threshold, st.sampled_from([2, 4]), st.floats(0, 0.99), RATIOS, st.floats(0, 1)),
        min_size=1,
        unique_by=lambda cell: (cell.exits, cell.threshold),
    ),
    least=st.floats(0, 1),
)
def test_no_better_threshold_is_left_lying(cells: list[sweep_thresholds.Cell], least: float) -> None:
    best = sweep_thresholds.best_of(cells, least, 1.1)
    better = [
        cell
        for cell in cells
        if cell.agreement >= least and cell.speed.median > (1.1 if best is None else best.speed.median)
    ]
    assert better == []
    assert best is None or (best.agreement >= least and best.speed.median > 1.1)


def _correction(
    alpha: float, top_k: int, gained: int, lost: int, *, loss: float = 2.0, tokens: int = 10_000
) -> sweep_corrections.Cell:
    right = 4_000 + gained - lost
    tally = sweep_corrections._Tally(tokens=tokens, right=right, gained=gained, lost=lost, loss=loss * tokens)
    return tally.as_cell(alpha, top_k)


def test_the_best_correction_is_the_most_accurate_then_the_one_with_least_loss_and_alpha() -> None:
    cells = [_correction(2, 10, 90, 10), _correction(1, 10, 100, 10), _correction(1, 5, 99, 9, loss=1.9)]
    assert sweep_corrections.best_of(cells) is cells[2]
    assert sweep_corrections.best_of([*cells, _correction(0.5, 20, 99, 9, loss=1.9)]).alpha == 0.5
    assert sweep_corrections.best_of(cells[:2]) is cells[1]
    unsure = _correction(4, 10, 2_100, 2_000)
    assert unsure.accuracy > cells[0].accuracy
    assert sweep_corrections.best_of([unsure, cells[0]]) is cells[0], "chance may have made the more accurate one"


def test_a_correction_that_chance_explains_is_none() -> None:
    """52 of 81 changes for the better is what a coin says once in a hundred times: enough alone, but not among 20."""
    alone = _correction(1, 10, 52, 29)
    assert alone.deviations == pytest.approx((52 - 29) / 81**0.5, rel=1e-3)
    assert sweep_corrections.best_of([alone]) is alone
    cells = [alone, *(_correction(2, top_k, 10, 30) for top_k in range(1, 20))]
    assert sweep_corrections.best_of(cells) is None
    said = sweep_corrections.verdict(cells, sweep_corrections.Full(10_000, 0.4, 2.0), None)
    assert "has +0.230%, 2.6 standard errors of the difference (one of 20 reaches 2.8 by chance)" in said
    assert sweep_corrections.best_of([_correction(1, 10, 0, 0)]) is None, "nothing changed"


@given(changes=st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=2, max_size=60))
def test_the_standard_error_is_that_of_a_mean_of_pairs(changes: list[int]) -> None:
    gained, lost = changes.count(1), changes.count(-1)
    cell = _correction(1, 10, gained, lost, tokens=len(changes))
    assert cell.difference == pytest.approx(np.mean(changes))
    assert cell.standard_error == pytest.approx(np.std(changes, ddof=1) / len(changes) ** 0.5, abs=1e-9)


def _completion(*emissions: Emission) -> Completion:
    return Completion((1,), "", emissions, "length")


def _token(token: int, *, draft_exit: int | None = None, discarded: int = 0) -> Emission:
    return Emission(token, 8, 1.0, draft_exit=draft_exit, discarded=discarded)


def test_cycles_counted_by_hand() -> None:
    """Drafts of three: all right; the second wrong; the first wrong. And one that a drafted stop token ends."""
    drafted = [_token(token, draft_exit=2) for token in range(4)]
    first = _completion(_token(0), *drafted[:3], _token(4), drafted[0], _token(6, discarded=2), _token(7, discarded=3))
    assert sweep_speculation.cycles_of(first) == 3
    assert sweep_speculation.cycles_of(_completion(_token(0), *drafted[:2])) == 1
    assert sweep_speculation.cycles_of(_completion(_token(0))) == 0


def test_tokens_in_the_same_place() -> None:
    truth = [_completion(*map(_token, (1, 2, 3, 4))), _completion(*map(_token, (5, 6)))]
    texts = [_completion(*map(_token, (1, 9, 3))), _completion(*map(_token, (5, 6, 7)))]
    assert sweep_speculation.same_tokens(texts, truth) == 4 / 6
    assert sweep_speculation.same_tokens(truth, truth) == 1.0


def test_what_is_said_of_drafts() -> None:
    cells = [
        sweep_speculation.Cell(*draft, _speed(speed), 0, 0, None, 0, None, same, same)
        for draft, speed, same in (((2, 3), 1.2, 1.0), ((4, 3), 0.9, 0.75), (("auto", "auto"), 1.3, 1.0))
    ]
    assert "exit and length auto: 1.30x" in sweep_speculation.verdict(cells, ("auto", "auto"), 1.1)
    said = sweep_speculation.verdict(cells, None, 1.5)
    assert said.startswith("Do not switch it on: no pair is faster than full depth by more than chance (1.500x)")
    assert "75.0% are with exit 4 with drafts of 3" in said
    speeds, accepted = sweep_speculation.panels(cells, (2, 3))
    assert (speeds.rows, speeds.columns, speeds.values, speeds.best) == (["2", "4"], ["3"], [[1.2], [0.9]], (0, 0))
    assert (accepted.values, speeds.note) == ([[None], [None]], "auto: 1.30x (1.17 to 1.43)")
    assert sweep_speculation.panels(cells, ("auto", "auto"))[0].note.endswith(", the best")
