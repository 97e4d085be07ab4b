"""How confident exits are: by hand, at the borders, in all precisions, and row by row.

Shapes: N rows, H hidden size, V the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from helpers.confidences import of_gate, of_logits, of_states
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_ee.inference.asked_exit import AskedExit
from megatron_ee.inference.measures import MEASURES, measure_of_logits
from megatron_ee.inference.runner import Runner
from megatron_ee.plugins import PluginError

OF_LOGITS = ["max_probability", "margin", "entropy"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class _Given:
    """Stands for a runner: what the exit reads is what it says."""

    def features(self, hidden_NH: torch.Tensor, layer: int) -> torch.Tensor:
        return hidden_NH

    def project(self, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        return features_NH

    def gate_logits(self, hidden_NH: torch.Tensor, layer: int) -> torch.Tensor:
        return hidden_NH[:, 0].float()


class _NoVocabulary(_Given):
    def project(self, features_NH: torch.Tensor, layer: int) -> torch.Tensor:
        raise AssertionError("a product with the vocabulary")


def asked(
    rows_NX: torch.Tensor, previous_NX: torch.Tensor | None = None, *, runner: type[_Given] = _Given
) -> AskedExit:
    """An exit whose logits, output and gate's logit (the first column) are these."""
    previous_NX = rows_NX.roll(1, -1) if previous_NX is None else previous_NX
    return AskedExit(cast(Runner, runner()), 2, hidden_NH=rows_NX, output_NH=rows_NX, previous_NH=previous_NX)


def confidence(measure: str, logits: Sequence[float], dtype: torch.dtype = torch.float64) -> float:
    return float(MEASURES[measure](asked(torch.tensor([logits], dtype=dtype)))[0])


def test_by_hand() -> None:
    logits = [math.log(share) for share in (0.2, 0.5, 0.3)]
    entropy = -sum(share * math.log(share) for share in (0.2, 0.5, 0.3))
    assert confidence("max_probability", logits) == pytest.approx(0.5, abs=1e-15)
    assert confidence("margin", logits) == pytest.approx(0.2, abs=1e-15)
    assert confidence("entropy", logits) == pytest.approx(1 - entropy / math.log(3), abs=1e-15)
    assert confidence("gate", [0.0]) == 0.5
    assert confidence("gate", [math.log(3)]) == pytest.approx(0.75, abs=1e-6)


def test_two_in_four_are_half_of_what_is_to_know() -> None:
    logits = [0.0, 0.0, -math.inf, -math.inf]
    assert confidence("max_probability", logits) == 0.5
    assert confidence("margin", logits) == 0.0
    assert confidence("entropy", logits) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ([3.0, 4.0], [4.0, 3.0], 24 / 25),
        ([3.0, 4.0], [300.0, 400.0], 1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.0),
        ([3.0, 4.0], [-3.0, -4.0], 0.0),  # turned round is no more settled than turned by 90 degrees
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_cosine_by_hand(now: list[float], before: list[float], expected: float) -> None:
    of_states = asked(torch.tensor([now]).double(), torch.tensor([before]).double(), runner=_NoVocabulary)
    assert float(MEASURES["cosine"](of_states)[0]) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("measure", ["cosine", "gate"])
def test_what_looks_at_hidden_states_asks_no_logits(measure: str) -> None:
    assert MEASURES[measure](asked(torch.ones(2, 3), runner=_NoVocabulary)).shape == (2,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_knowing_nothing_and_everything(dtype: torch.dtype) -> None:
    for size in (2, 1000, 8192):
        uniform, sure = [7.0] * size, [0.0] * (size - 1) + [60000.0]
        assert confidence("max_probability", uniform, dtype) == pytest.approx(1 / size, rel=1e-6)
        assert confidence("margin", uniform, dtype) == 0.0
        assert confidence("entropy", uniform, dtype) == pytest.approx(0.0, abs=1e-6)
        assert [confidence(measure, sure, dtype) for measure in OF_LOGITS] == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_make_an_exit_sure(dtype: torch.dtype) -> None:
    """A softmax in the logits' own precision rounds to 1, though the exit is wrong once in thousands."""
    logits_NV = torch.tensor([[0.0, 10.0, 0.5]], dtype=dtype)
    assert float(logits_NV.softmax(-1).max()) == 1.0
    for measure in OF_LOGITS:
        values = MEASURES[measure](asked(logits_NV))
        assert values.dtype == torch.float32 and 0.99 < float(values) < 1.0
        torch.testing.assert_close(values.double(), MEASURES[measure](asked(logits_NV.double())), atol=1e-6, rtol=0)
    turned_NH = torch.tensor([[100.0, 2.0]], dtype=dtype)
    straight_NH = torch.tensor([[100.0, 0.0]], dtype=dtype)
    values = MEASURES["cosine"](asked(turned_NH, straight_NH))
    assert values.dtype == torch.float32
    assert float(values) == pytest.approx(100 / math.hypot(100, 2), abs=1e-6)
    assert float(values) < 1.0 == float(values.to(dtype))


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_no_number_stays_in_its_row(measure: str) -> None:
    rows_NX = torch.randn(4, 6, dtype=torch.float64)
    whole_N = MEASURES[measure](asked(rows_NX.clone()))
    for broken in (math.nan, math.inf) if measure in OF_LOGITS else (math.nan,):
        rows_NX[2, 0] = broken
        values_N = MEASURES[measure](asked(rows_NX))
        assert torch.isnan(values_N).tolist() == [False, False, True, False], broken
        assert torch.equal(values_N[[0, 1, 3]], whole_N[[0, 1, 3]])


@pytest.mark.parametrize("measure", OF_LOGITS)
def test_a_token_that_cannot_be_said_has_no_probability(measure: str) -> None:
    apart = confidence(measure, [1.0, 2.0, -1e5, 0.5])
    assert confidence(measure, [1.0, 2.0, -math.inf, 0.5]) == apart
    assert 0 < apart < 1


rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(2, 40)),
    elements=st.one_of(st.floats(-3, 3), st.floats(-6e4, 6e4)),
)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=rows)
@settings(max_examples=60)
def test_confidences_are_between_0_and_1_also_when_rounded(dtype: torch.dtype, rows: np.ndarray) -> None:
    rows_NX = torch.from_numpy(rows).to(dtype)
    same = asked(rows_NX, rows_NX * 3 if dtype != torch.float16 else rows_NX)
    for name, measure in MEASURES.items():
        for of_rows in (asked(rows_NX), same):
            values_N = measure(of_rows)
            assert values_N.shape == (len(rows),) and values_N.is_floating_point()
            assert bool(((values_N >= 0) & (values_N <= 1)).all()), (name, values_N)


def _written_out(measure: str, row_X: np.ndarray, previous_X: np.ndarray) -> float:
    if measure == "gate":
        return of_gate(row_X[0])
    return of_states(row_X, previous_X) if measure == "cosine" else of_logits(measure, row_X)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_every_measure_is_what_its_formula_says(measure: str, dtype: torch.dtype, within: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NV = (scale * torch.randn(5, 300, generator=generator)).to(dtype)
    previous_NV = rows_NV + (scale * torch.randn(5, 300, generator=generator)).to(dtype)
    pairs = zip(rows_NV.double().numpy(), previous_NV.double().numpy(), strict=True)
    expected_N = [_written_out(measure, *pair) for pair in pairs]
    values_N = MEASURES[measure](asked(rows_NV, previous_NV))
    within = 1e-6 if measure == "gate" else within  # whose logits are fp32
    np.testing.assert_allclose(values_N.numpy(), expected_N, atol=within, rtol=0)


@given(data=st.data(), rows=rows)
@settings(max_examples=100)
def test_a_row_decides_for_itself(data: st.DataObject, rows: np.ndarray) -> None:
    """EE-LLM asks the last row of a batch for all of it."""
    order = data.draw(st.permutations(range(len(rows))))
    some = order[: data.draw(st.integers(1, len(order)))]
    rows_NX = torch.from_numpy(rows)
    previous_NX = rows_NX.roll(1, -1)
    for name, measure in MEASURES.items():
        together_N = measure(asked(rows_NX, previous_NX))
        picked = measure(asked(rows_NX[some], previous_NX[some]))
        torch.testing.assert_close(picked, together_N[some], atol=1e-12, rtol=0, msg=name)
        of_the_same = measure(asked(rows_NX, previous_NX).of(some))
        torch.testing.assert_close(of_the_same, together_N[some], atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_measure_waits_for_its_numbers(measure: str) -> None:
    """A tensor without storage has none to wait for: whatever looks at one fails."""
    values_N = MEASURES[measure](asked(torch.empty(3, 16, device="meta")))
    assert (values_N.device.type, values_N.shape) == ("meta", (3,))


def test_a_plug_ins_measure_sees_the_logits() -> None:
    logits_NV = torch.randn(3, 7)
    measure = measure_of_logits(lambda logits_NV: logits_NV.softmax(-1).square().sum(-1))
    torch.testing.assert_close(measure(asked(logits_NV)), logits_NV.softmax(-1).square().sum(-1))


@pytest.mark.parametrize(
    ("of_rows", "given"),
    [
        (lambda logits_NV: 0.5, "float"),
        (lambda logits_NV: logits_NV.softmax(-1).max(), "float32 []"),
        (lambda logits_NV: logits_NV.softmax(-1), "float32 [3, 7]"),
        (lambda logits_NV: logits_NV.argmax(-1), "int64 [3]"),
    ],
)
def test_a_plug_in_that_gives_no_confidence_a_row_is_named(
    of_rows: Callable[[torch.Tensor], torch.Tensor], given: str
) -> None:
    with pytest.raises(PluginError) as caught:
        measure_of_logits(of_rows)(asked(torch.randn(3, 7)))
    assert str(caught.value) == (
        f"inference.exit.measure: the plug-in's gives {given} for 3 rows, not one floating number a row, [3]"
    )
