"""Loads: what is drawn has the shares that were asked for, and comes back from a file as it was."""

import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_ee.errors import FieldError
from megatron_ee.inference.scheduling.simulate import SimulatedRequest
from megatron_ee.inference.scheduling.workload import Depths, Lengths, arrivals, drawn_load, read_load, write_load

SHARES = {2: 0.5, 5: 0.3, 8: 0.2}


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_shares_hold_over_requests_whatever_their_difficulty(difficulty: float) -> None:
    numbers = random.Random(0)
    texts = [Depths(SHARES, difficulty).draw(20, numbers) for _ in range(3000)]
    counts = Counter(depth for text in texts for depth in text)
    for layer, share in SHARES.items():
        assert counts[layer] / 60_000 == pytest.approx(share, abs=0.03)
    of_one_depth = sum(len(set(text)) == 1 for text in texts) / len(texts)
    assert of_one_depth == 1.0 if difficulty == 1.0 else of_one_depth < 0.2


def test_lengths_have_their_median_and_their_limit() -> None:
    numbers = random.Random(0)
    lengths = sorted(Lengths(50, spread=0.8, most=200).draw(numbers) for _ in range(2001))
    assert lengths[1000] == pytest.approx(50, rel=0.1)
    assert (lengths[0] >= 1, lengths[-1]) == (True, 200)
    assert {Lengths(7, spread=0.0).draw(numbers) for _ in range(9)} == {7}


@pytest.mark.parametrize("kind", ["poisson", "bursts"])
def test_arrivals_have_their_rate(kind: str) -> None:
    times = list(arrivals(kind, 4000, 2.0, random.Random(0)))  # type: ignore[arg-type]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.15)
    assert (max(Counter(times).values()) == 8) == (kind == "bursts")
    assert set(arrivals("at once", 5, 2.0, random.Random(0))) == {0.0}


def test_a_load_is_replayed_from_its_file(tmp_path: Path) -> None:
    times = list(arrivals("poisson", 20, 1.0, random.Random(1)))
    load = drawn_load(20, Lengths(12), Lengths(30), Depths(SHARES), times, seed=3)
    assert load == drawn_load(20, Lengths(12), Lengths(30), Depths(SHARES), times, seed=3)
    load.append(SimulatedRequest(3, (5, 8), 2.0, exits=(5,)))
    write_load(tmp_path / "load.jsonl", load)
    assert read_load(tmp_path / "load.jsonl") == load


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": 3, "depths": [2]}',
        '{"prompt": 1, "depths": [2], "arrival": NaN}',
        '{"prompt": 1, "depths": [2], "arrival": -1}',
        '{"prompt": 0, "depths": [2], "arrival": 0}',
        '{"prompt": 1, "depths": [], "arrival": 0}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write_load(tmp_path / "load.jsonl", [SimulatedRequest(1, (2,))])
    with (tmp_path / "load.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FieldError, match=r"load\.jsonl:2"):
        read_load(tmp_path / "load.jsonl")


def test_a_file_without_requests_is_none(tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").touch()
    with pytest.raises(FieldError, match=r"load\.jsonl: holds no request"):
        read_load(tmp_path / "load.jsonl")
