"""LayerSkip's formulas (arXiv 2404.16710) against values by hand, and what holds for any settings."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import LayerDropoutConfig, LayerSkipConfig
from megatron_ee.training.curriculum import (
    depth_scale,
    dropout_probabilities,
    exit_scale,
    is_enabled,
    layerskip_weights,
    time_scale,
)

CURRICULA = ("none", "rotational", "gradual")
SHAPES = ("exponential", "linear", "sqrt", "uniform")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("exponential", [0.0, 2**0.25 - 1, 2**0.5 - 1, 2**0.75 - 1, 1.0]),
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("sqrt", [0.0, 0.5, math.sqrt(0.5), math.sqrt(0.75), 1.0]),
        ("uniform", [1.0] * 5),
    ],
)
def test_depth(shape: str, expected: list[float]) -> None:
    assert [depth_scale(shape, layer, 5) for layer in range(5)] == pytest.approx(expected)


def test_time() -> None:
    expected = [0.0, 2**0.25 - 1, 2**0.5 - 1, 2**0.75 - 1, 1.0]
    assert [time_scale("exponential", iteration, 5) for iteration in range(5)] == pytest.approx(expected)
    assert [time_scale("none", iteration, 5) for iteration in range(5)] == [1.0] * 5


def test_probability_is_the_product() -> None:
    settings = LayerDropoutConfig(maximum=0.2, shape="linear", curriculum="exponential")
    at_half = dropout_probabilities(settings, 3, iteration=2, train_iters=5)
    assert at_half == pytest.approx([0.0, 0.1 * (2**0.5 - 1), 0.2 * (2**0.5 - 1)])


def test_exit_scale() -> None:
    """e_scale = 0.5, L = 5: sums of 0..l are 0, 1, 3, 6, and the last is 4 + 0.5 x 6."""
    assert [exit_scale(layer, 5, 0.5) for layer in range(5)] == [0.0, 0.5, 1.5, 3.0, 7.0]


def test_weights_of_all_exits() -> None:
    weights = layerskip_weights(
        LayerSkipConfig(scale=0.5, curriculum="none"), [1, 2, 3, 4], 5, iteration=0, train_iters=1
    )
    assert weights == pytest.approx({2: 0.5 / 12, 3: 1.5 / 12, 4: 3 / 12, 5: 7 / 12}), "exit 1 is l = 0: none"


def test_weights_of_some_exits_sum_to_one_over_those() -> None:
    weights = layerskip_weights(LayerSkipConfig(scale=0.5, curriculum="none"), [3], 5, iteration=0, train_iters=1)
    assert weights == pytest.approx({3: 1.5 / 8.5, 5: 7 / 8.5})


def _enabled(settings: LayerSkipConfig, iteration: int, *, num_layers: int, train_iters: int) -> list[int]:
    return [
        layer
        for layer in range(num_layers)
        if is_enabled(settings, layer, num_layers, iteration=iteration, train_iters=train_iters)
    ]


def test_rotation_shifts_by_one_and_keeps_the_last_layer() -> None:
    settings = LayerSkipConfig(curriculum="rotational", rotation=3)
    turns = [_enabled(settings, iteration, num_layers=8, train_iters=100) for iteration in range(4)]
    assert turns == [[0, 3, 6, 7], [1, 4, 7], [2, 5, 7], [0, 3, 6, 7]]


def test_gradual_adds_a_layer_every_t_over_2l() -> None:
    """L = 4, T = 16: one more every 2 iterations, all from the 7th on."""
    settings = LayerSkipConfig(curriculum="gradual")
    turns = [_enabled(settings, iteration, num_layers=4, train_iters=16) for iteration in (0, 1, 2, 4, 5, 6, 15)]
    assert turns == [[3], [3], [2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(("curriculum", "shape"), product(CURRICULA, SHAPES))
def test_one_layer_and_one_iteration_divide_by_nothing(curriculum: str, shape: str) -> None:
    settings = LayerSkipConfig.model_validate({"curriculum": curriculum})
    assert layerskip_weights(settings, [], 1, iteration=0, train_iters=1) == {1: 1.0}
    dropout = LayerDropoutConfig.model_validate({"shape": shape, "curriculum": "exponential"})
    assert dropout_probabilities(dropout, 1, iteration=0, train_iters=1) == [0.0]


@st.composite
def _moments(draw: st.DrawFn) -> tuple[LayerSkipConfig, list[int], int, int, int]:
    num_layers, train_iters = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    settings = {"scale": draw(st.floats(0, 1)), "curriculum": draw(st.sampled_from(CURRICULA))}
    if settings["curriculum"] == "rotational":
        settings["rotation"] = draw(st.integers(1, 50))
    exits = draw(st.sets(st.integers(1, num_layers - 1))) if num_layers > 1 else set()
    iteration = draw(st.integers(0, train_iters - 1))
    return LayerSkipConfig.model_validate(settings), sorted(exits), num_layers, iteration, train_iters


@given(_moments())
def test_weights_sum_to_one_and_the_last_layer_always_has_most(
    moment: tuple[LayerSkipConfig, list[int], int, int, int],
) -> None:
    """torchtune's version leaves the last layer without a loss, so without a gradient."""
    settings, exits, num_layers, iteration, train_iters = moment
    weights = layerskip_weights(settings, exits, num_layers, iteration=iteration, train_iters=train_iters)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights.keys() <= {*exits, num_layers}
    assert all(weight > 0 for weight in weights.values())
    assert weights[num_layers] == max(weights.values())


@given(st.integers(2, 40), st.integers(1, 50), st.integers(0, 1000))
def test_every_exit_has_its_turn_once_in_a_rotation(num_layers: int, rotation: int, first: int) -> None:
    settings = LayerSkipConfig(curriculum="rotational", rotation=rotation)
    turns = [
        layer
        for iteration in range(first, first + rotation)
        for layer in _enabled(settings, iteration, num_layers=num_layers, train_iters=2000)
        if layer < num_layers - 1
    ]
    assert sorted(turns) == list(range(num_layers - 1))


@given(st.integers(1, 40), st.integers(1, 200))
def test_gradual_only_grows_and_has_all_from_half_of_the_run_on(num_layers: int, train_iters: int) -> None:
    settings = LayerSkipConfig(curriculum="gradual")
    sizes = [
        len(_enabled(settings, iteration, num_layers=num_layers, train_iters=train_iters))
        for iteration in range(train_iters)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert all(size == num_layers for size in sizes[-(-train_iters // 2) :] if train_iters > 1)


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(["none", "exponential"]),
    st.floats(0, 0.99),
    st.integers(1, 40),
    st.integers(1, 100),
)
def test_probabilities_grow_with_depth_and_time_up_to_the_maximum(
    shape: str, curriculum: str, maximum: float, num_layers: int, train_iters: int
) -> None:
    settings = LayerDropoutConfig.model_validate({"maximum": maximum, "shape": shape, "curriculum": curriculum})
    table = [
        dropout_probabilities(settings, num_layers, iteration=iteration, train_iters=train_iters)
        for iteration in range(train_iters)
    ]
    for row in table:
        assert row == sorted(row) and row[0] >= 0 and row[-1] <= maximum + 1e-12
    for column in zip(*table, strict=True):
        assert list(column) == sorted(column)
    if num_layers > 1 and train_iters > 1:
        assert table[-1][-1] == pytest.approx(maximum)
