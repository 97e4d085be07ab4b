"""Cuts against all cuts there are."""

from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import StagePlacement
from megatron_ee.parallel.balance import Work, balance

DURATIONS = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10))


@st.composite
def works(draw: st.DrawFn, max_layers: int) -> Work:
    num_layers = draw(st.integers(1, max_layers))
    layers = draw(st.sets(st.integers(1, num_layers - 1))) if num_layers > 1 else set()
    exits = {layer: draw(DURATIONS) for layer in sorted(layers)}
    at_end = draw(st.sets(st.sampled_from(sorted(layers)))) if layers else set()
    one = st.one_of(st.integers(1, 6).map(float), st.floats(0.1, 10))
    alike = st.builds(lambda layer: (layer,) * num_layers, one)
    layers_alike_or_not = st.one_of(alike, st.tuples(one, *[DURATIONS] * (num_layers - 1)))
    return Work(draw(layers_alike_or_not), draw(DURATIONS), draw(DURATIONS), exits, frozenset(at_end))


def _durations(work: Work, placements: tuple[StagePlacement, ...]) -> list[float]:
    """Of each part; every exit has to be in exactly one."""
    stops = list(accumulate(part.layers for part in placements))
    assert stops[-1] == work.num_layers
    durations, placed = [], []
    for placement, start, stop in zip(placements, [0, *stops], stops, strict=False):
        own = [layer for layer in work.exits if start < layer < stop]
        own += [start] * (placement.exits_at_start and start in work.exits)
        own += [stop] * (placement.exits_at_end and stop in work.exits)
        assert not (start in own and start in work.only_at_end)
        placed += own
        ends = work.first * (start == 0) + work.last * (stop == work.num_layers)
        durations.append(sum(work.layers[start:stop]) + sum(work.exits[layer] for layer in own) + ends)
    assert sorted(placed) == sorted(work.exits)
    return durations


def _all_cuts(work: Work, num_parts: int) -> Iterator[tuple[StagePlacement, ...]]:
    for stops in combinations(range(1, work.num_layers), num_parts - 1):
        sides = [[False] if stop in work.only_at_end else [False, True] for stop in stops]
        for at_start in product(*sides):
            ends = [(0, False), *zip(stops, at_start, strict=True), (work.num_layers, False)]
            yield tuple(
                StagePlacement(layers=stop - start, exits_at_start=here, exits_at_end=not there)
                for (start, here), (stop, there) in pairwise(ends)
            )


@given(work=works(max_layers=9), data=st.data())
def test_no_cut_has_a_faster_slowest_part_nor_with_the_same_one_more_equal_parts(
    work: Work, data: st.DataObject
) -> None:
    num_parts = data.draw(st.integers(1, work.num_layers))
    found = _durations(work, balance(work, num_parts))
    every = [_durations(work, cut) for cut in _all_cuts(work, num_parts)]
    slowest = min(map(max, every))
    assert max(found) == pytest.approx(slowest, rel=1e-9)
    best = [cut for cut in every if max(cut) <= slowest * (1 + 1e-9)]
    squares = min(sum(duration**2 for duration in cut) for cut in best)
    assert sum(duration**2 for duration in found) == pytest.approx(squares, rel=1e-9)


@given(work=works(max_layers=24), data=st.data())
def test_with_several_parts_a_stage_it_is_never_worse_than_equal_layers(work: Work, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, work.num_layers))
    chunks = data.draw(st.integers(1, work.num_layers // num_stages))
    layers, left_over = divmod(work.num_layers, num_stages * chunks)
    equal = tuple(StagePlacement(layers=layers + (part < left_over)) for part in range(num_stages * chunks))
    placements = balance(work, num_stages, chunks)
    found, plain = (_durations(work, parts) for parts in (placements, equal))
    assert len(found) == num_stages * chunks
    slowest, of_equal = (max(sum(parts[stage::num_stages]) for stage in range(num_stages)) for parts in (found, plain))
    assert slowest <= of_equal * (1 + 1e-9)
    assert balance(work, num_stages, chunks) == placements, "the same on every rank"


def test_of_equals_the_first_parts_have_more_layers_and_exits_stay_at_ends() -> None:
    work = Work((1.0,) * 8, 0.0, 0.0, {3: 0.0, 6: 0.0})
    assert balance(work, 3) == tuple(StagePlacement(layers=layers) for layers in (3, 3, 2))


def test_an_exit_goes_to_the_cheaper_side_of_its_border_unless_it_reads_its_layer() -> None:
    exits = dict.fromkeys((2, 3, 4), 1.0)
    left, right = balance(Work((1.0,) * 8, 0.0, 1.0, exits), 2)
    assert (left.layers, left.exits_at_end, right.exits_at_start) == (4, False, True), "2 exits and the final one: 6, 6"
    left, right = balance(Work((1.0,) * 8, 0.0, 1.0, exits, only_at_end=frozenset({4})), 2)
    assert (left.layers, left.exits_at_end, right.exits_at_start) == (4, True, False), "7 and 5"


def test_an_expensive_head_takes_layers_from_its_stage() -> None:
    assert [part.layers for part in balance(Work((1.0,) * 32, 0.0, 2.4, {}), 4)] == [9, 9, 8, 6]
    assert [part.layers for part in balance(Work((1.0,) * 9, 3.0, 3.0, {}), 3)] == [2, 5, 2]


def test_cheap_layers_go_together() -> None:
    work = Work((1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.0), 0.0, 0.0, {})
    assert [part.layers for part in balance(work, 3)] == [2, 2, 5]


def test_slowest_parts_that_rounding_alone_tells_apart_are_equal() -> None:
    """18, 16, 2 and 9, 9, 18, in units that none of them is a whole number of."""
    work = Work((9.0, 9.0, 8.0, 2.0), 0.0, 0.0, {3: 8.0}, only_at_end=frozenset({3}))
    assert [part.layers for part in balance(work, 3)] == [1, 1, 2]
