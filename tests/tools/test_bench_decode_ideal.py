"""The least time that decoding can take, against what one computes by hand."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from helpers.decoding import decode, opened, request
from helpers.models import whole_model

from megatron_ee.config import ExitParams
from megatron_ee.config.inference import KvPolicy
from megatron_ee.inference.batch import Batch
from megatron_ee.inference.measures import Measure
from megatron_ee.parallel.mesh import Mesh

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_decode_ideal")


def costs_of(ideal: Any, *, per_row: float = 0.0, head: float = 3.0, store: float = 0.25) -> Any:
    """Exits after 2, 4 and 6 of 8 layers: a layer takes a second, and for every row after the first `per_row` more."""
    segments = ((0, 2), (2, 4), (4, 6), (6, 8))

    def curve(first: float, more: float) -> tuple[tuple[int, float], ...]:
        return (1, first), (2, first + more), (10, first + 9 * more)

    return ideal.LaunchCosts(
        {segment: curve(2.0, 2 * per_row) for segment in segments},
        {stop: curve(head, 0.0) for stop in (2, 4, 6)},
        {stop: curve(head if stop == 8 else 0.0, 0.0) for _, stop in segments},
        {segment: curve(2 * store, 2 * store) for segment in segments},
    )


def test_seconds_are_on_straight_lines_between_what_was_measured(ideal: Any) -> None:
    curve = ((1, 2.0), (2, 3.0), (4, 3.5), (8, 7.5))
    assert [ideal.cost_of(curve, rows) for rows in (0, 1, 2, 3, 4, 6, 8, 10)] == [0, 2, 3, 3.25, 3.5, 5.5, 7.5, 9.5]


def test_one_sequence_whose_missing_keys_cost_nothing_obeys_the_law(ideal: Any) -> None:
    costs, depths = costs_of(ideal), [8, 2, 4, 2, 6, 8, 2, 2]
    found = ideal.need([depths], [1], costs, "recompute")
    num, eta, tested = len(depths), 3.0, sum(depth // 2 for depth in depths)
    assert costs.layer == 1
    assert (found.layers, found.heads, found.missing_kv) == (sum(depths), eta * tested, 0)
    full = num * (8 + eta)
    law = (8 + eta) / (sum(depths) / num + eta * tested / num)
    assert full / found.total == pytest.approx(law)


def test_what_waits_joins_the_first_token_that_goes_deeper(ideal: Any) -> None:
    costs = costs_of(ideal, per_row=0.1, head=0.0)
    found = ideal.need([[8, 2, 2, 4, 2, 8]], [1], costs, "recompute")
    assert found.layers == 26
    # two join token 4 in layers 3-4; token 6 takes one along there, and all four from layer 5 on
    assert found.missing_kv == pytest.approx(2 * 0.2 + 1 * 0.2 + 2 * 4 * 0.2)
    assert ideal.need([[8, 2, 2, 4, 2, 8]], [1], costs, "fill") == found


def test_what_nobody_goes_deeper_after_is_never_made_up_for(ideal: Any) -> None:
    found = ideal.need([[8, 2, 2, 2]], [1], costs_of(ideal, per_row=0.1), "recompute")
    assert found.missing_kv == 0


def test_a_prompt_whose_last_position_exits_waits_as_a_whole(ideal: Any) -> None:
    costs = costs_of(ideal, per_row=0.1, head=0.0)
    found = ideal.need([[2, 8]], [5], costs, "recompute")
    assert found.layers == pytest.approx(2 * 1.4 + 8)
    assert found.missing_kv == pytest.approx(3 * 5 * 0.2)


def test_propagation_stores_the_layers_above_at_once_and_nothing_waits(ideal: Any) -> None:
    costs = costs_of(ideal, per_row=0.1, head=0.0, store=0.25)
    found = ideal.need([[8, 2, 6, 8, 2]], [1], costs, "propagate")
    # six layers for the second token, two for the third; what ends the text leaves nothing behind
    assert found.missing_kv == pytest.approx(8 * 0.25)
    assert found.layers == 26


def test_propagation_runs_a_prompt_to_full_depth_but_for_its_last_position(ideal: Any) -> None:
    costs = costs_of(ideal, per_row=0.1, head=0.0, store=0.25)
    found = ideal.need([[2, 8]], [5], costs, "propagate")
    assert found.layers == pytest.approx(4 * (2 + 3 * 0.2) + 2 + 8)
    assert found.missing_kv == pytest.approx(6 * 0.25)


def test_sequences_step_together_and_join_only_their_own(ideal: Any) -> None:
    costs = costs_of(ideal, per_row=0.1, head=3.0)
    found = ideal.need([[8, 2, 8], [8, 8], [8, 2]], [1, 1, 1], costs, "recompute")
    # rows by step: 3 in every segment; 3, then 1; 1, whose own position waits
    assert found.layers == pytest.approx(8 * 1.2 + 2 * 1.2 + 6 * 1.0 + 8)
    assert found.missing_kv == pytest.approx(3 * 0.2)
    assert found.heads == 3.0 * (4 + 4 + 4)


def test_an_exit_that_is_asked_without_its_logits_computes_them_when_it_speaks(ideal: Any) -> None:
    costs = costs_of(ideal)
    asks, speaks = dict.fromkeys((2, 4, 6), ((1, 0.5),)), dict.fromkeys((2, 4, 6, 8), ((1, 3.0),))
    gated = ideal.LaunchCosts(costs.segments, asks, speaks, costs.stores)
    assert gated.eta == 0.5
    assert ideal.need([[8, 2, 6]], [1], gated, "recompute").heads == 0.5 * (3 + 1 + 3) + 3 * 3.0


def test_full_depth_asks_the_last_exit_alone(ideal: Any) -> None:
    costs = costs_of(ideal)
    found = ideal.full_need([4, 2], [3, 1], costs)
    assert (found.layers, found.heads, found.missing_kv) == (4 * 8, 4 * 3, 0)


@pytest.mark.parametrize("kv_policy", ["recompute", "propagate"])
@pytest.mark.parametrize("prompts", [[3], [3, 5, 1]], ids=["alone", "together"])
def test_a_batch_runs_the_rows_that_its_depths_need_and_no_others(
    ideal: Any, mesh: Mesh, kv_policy: KvPolicy, prompts: list[int]
) -> None:
    """Where a row costs a second a segment, so much as the batch's own count says."""
    drawn: dict[str, Measure] = {"drawn": lambda asked: (1e3 * asked.hidden_NH.sum(-1)) % 1}
    model = opened(whole_model(mesh, exits=[2, 5]), measures=drawn)
    batch = Batch(model, slots=len(prompts), capacity=32)
    params = ExitParams(measure="drawn", threshold=0.6, kv_policy=kv_policy)
    texts = decode(batch, [request(range(1, length + 1), params) for length in prompts])
    depths = [[emission.exit_layer for emission in text] for text in texts]
    assert {depth for of in depths for depth in of} == {2, 5, 8}, depths
    segments, rows = ((0, 2), (2, 5), (5, 8)), ((1, 1.0), (2, 2.0))
    free = dict.fromkeys((2, 5, 8), ((1, 0.0),))
    costs = ideal.LaunchCosts(dict.fromkeys(segments, rows), free, free, dict.fromkeys(segments, rows))
    work = batch.walk.work
    ran = sum(
        sum(start <= of[0] < of[1] <= stop for of in segments) * rows for (start, stop), rows in work.rows.items()
    )
    stored = sum(sum(start <= of[0] for of in segments) * rows for (start, _), rows in work.stored.items())
    assert ideal.need(depths, prompts, costs, kv_policy).total == ran + stored
