"""Stages of a decoding pipeline, against all cuts there are and against hand counts."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import DecodingParallelConfig, ExitParams, ExitsConfig, InferenceConfig, ModelConfig
from megatron_ee.errors import FieldError
from megatron_ee.inference.exit_depths import write_depths
from megatron_ee.inference.stage_layout import decoding_work, stage_stops
from megatron_ee.parallel.balance import Work

WIDTH, FFN = 8, 16
LAYER = 4 * WIDTH**2 + 3 * WIDTH * FFN
EXITS = ExitsConfig(layers=(4, 8, 12))
TOKENS = {4: 400, 8: 200, 12: 100, 16: 300}


def _model(num_layers: int) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, hidden_size=WIDTH, num_attention_heads=2, ffn_hidden_size=FFN)


def _inference(exit: ExitParams | None = None, **parallel: Any) -> InferenceConfig:
    return InferenceConfig(exit=exit or ExitParams(), parallel=DecodingParallelConfig(**parallel))


def _durations(work: Work, stops: tuple[int, ...]) -> list[float]:
    """Of each stage: an exit on a border is with the stage before it, the final one with the last."""
    assert stops[-1] == work.num_layers
    stages = [
        sum(work.layers[start:stop]) + sum(time for layer, time in work.exits.items() if start < layer <= stop)
        for start, stop in pairwise((0, *stops))
    ]
    return [*stages[:-1], stages[-1] + work.last]


@pytest.fixture
def measured(tmp_path: Path) -> str:
    path = tmp_path / "depths.json"
    write_depths(path, TOKENS, num_layers=16, exit=ExitParams())
    return str(path)


def test_the_worked_example(measured: str) -> None:
    """Heads of a vocabulary of nothing take no time: only layers count."""
    stops = stage_stops(_model(16), EXITS, _inference(pipeline=4, layout="survival", depths=measured), vocab_size=0)
    assert stops == (2, 5, 9, 16)
    work = decoding_work(_model(16), EXITS, ExitParams(), 0, TOKENS)
    assert [time / LAYER for time in _durations(work, stops)] == pytest.approx([2, 2.6, 2.2, 2.4])
    equal = stage_stops(_model(16), EXITS, _inference(pipeline=4), vocab_size=0)
    assert equal == (4, 8, 12, 16)
    of_equal = max(_durations(work, equal))
    assert of_equal / max(_durations(work, stops)) == pytest.approx(4 / 2.6)
    assert of_equal / (sum(work.layers) / 4) == pytest.approx(4 / 2.3), "the ideal"


def test_a_head_takes_layers_from_its_stage() -> None:
    """Exits count by half a layer, the final one too: of four stages of 16 layers and 4 heads, each gets 4.5."""
    half = LAYER // 2 // WIDTH
    model = _model(16)
    assert stage_stops(model, EXITS, _inference(pipeline=4), half) == (4, 8, 12, 16)
    no_exits = ExitsConfig()
    assert stage_stops(model, no_exits, _inference(pipeline=3), 6 * half) == (7, 13, 16), "7, 6, and 3 + 3"
    assert stage_stops(model, no_exits, _inference(pipeline=3), 6 * half, calls=LAYER) == (6, 12, 16), "12, 12, 8 + 3"
    early = ExitsConfig(layers=(1, 2))
    assert stage_stops(model, early, _inference(pipeline=2), 2 * half) == (8, 16), "8 + 2 and 8 + 1"
    assert stage_stops(model, early, _inference(pipeline=2), 4 * half) == (7, 16), "7 + 4 and 9 + 2"
    unasked = ExitParams(mode="full")
    assert stage_stops(model, early, _inference(unasked, pipeline=2), 4 * half) == (9, 16), "9 and 7 + 2"


@pytest.mark.parametrize(
    ("params", "shares"),
    [
        (ExitParams(), (1, 0.6, 0.4)),
        (ExitParams(measure="cosine"), (0.4, 0.2, 0.1)),
        (ExitParams(measure="gate"), (0.4, 0.2, 0.1)),
        (ExitParams(measure="gate", patience=2), (1, 0.6, 0.4)),
        (ExitParams(min_exit=8), (0.4, 0.6, 0.4)),
        (ExitParams(mode="full"), (0.4, 0.2, 0.1)),
        (ExitParams(mode="speculative", draft_exit=8), (0.4, 0.6, 0.1)),
        (ExitParams(mode="sled"), (1, 0.6, 0.4)),
    ],
)
def test_heads_count_for_tokens_that_ask_them_or_leave_there(params: ExitParams, shares: tuple[float, ...]) -> None:
    exits = ExitsConfig(layers=(4, 8, 12), head=("norm", "mlp", "block"))
    work = decoding_work(_model(16), exits, params, 10, TOKENS, calls=5)
    heads = (10 * WIDTH, 10 * WIDTH + 3 * WIDTH * FFN, 10 * WIDTH + LAYER)
    assert [*work.exits.values()] == pytest.approx([share * head for share, head in zip(shares, heads, strict=True)])
    assert work.layers == pytest.approx([share * (LAYER + 5) for share in (1, 0.6, 0.4, 0.3) for _ in range(4)])
    assert work.last == pytest.approx(0.3 * heads[0])


@given(data=st.data())
def test_no_cut_has_a_faster_slowest_stage_nor_with_the_same_one_more_equal_stages(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    num_layers = data.draw(st.integers(1, 9))
    layers = tuple(sorted(data.draw(st.sets(st.integers(1, num_layers - 1))))) if num_layers > 1 else ()
    tokens = {layer: data.draw(st.integers(0, 9)) for layer in layers} | {num_layers: data.draw(st.integers(1, 9))}
    stages, vocab_size = data.draw(st.integers(1, num_layers)), data.draw(st.integers(0, 300))
    path = tmp_path_factory.getbasetemp() / "depths.json"
    write_depths(path, tokens, num_layers=num_layers, exit=ExitParams())
    model, exits = _model(num_layers), ExitsConfig(layers=layers)
    survival = _inference(pipeline=stages, layout="survival", depths=str(path))
    for inference, counted in ((survival, tokens), (_inference(pipeline=stages), {num_layers: 1})):
        work = decoding_work(model, exits, inference.exit, vocab_size, counted)
        found = _durations(work, stage_stops(model, exits, inference, vocab_size))
        cuts = combinations(range(1, num_layers), stages - 1)
        every = [_durations(work, (*cut, num_layers)) for cut in cuts]
        slowest = min(map(max, every))
        assert max(found) == pytest.approx(slowest, rel=1e-9)
        squares = min(sum(time**2 for time in cut) for cut in every if max(cut) <= slowest * (1 + 1e-9))
        assert sum(time**2 for time in found) == pytest.approx(squares, rel=1e-9)


def test_a_list_says_it_all_and_one_stage_is_the_model() -> None:
    inference = _inference(pipeline=4, layout=(2, 3, 4, 7))
    assert stage_stops(_model(16), EXITS, inference, vocab_size=64) == (2, 5, 9, 16)
    assert stage_stops(_model(16), EXITS, _inference(), vocab_size=64) == (16,)


def test_a_stage_that_no_token_reaches_has_a_layer_too(tmp_path: Path) -> None:
    path = tmp_path / "depths.json"
    write_depths(path, {2: 5}, num_layers=6, exit=ExitParams())
    inference = _inference(pipeline=4, layout="survival", depths=str(path))
    stops = stage_stops(_model(6), ExitsConfig(layers=(2,)), inference, vocab_size=64)
    assert stops[0] == 1 and stops[-1] == 6 and sorted(set(stops)) == list(stops)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"pipeline": 17}, "pipeline: 17 stages need at least 17 layers, not 16"),
        ({"pipeline": 2, "layout": (8, 9)}, "layout: its layers add up to 17, not to num_layers = 16"),
        ({"layout": "survival"}, "depths: null, but layout survival needs a file"),
        ({"layout": "survival", "depths": "none.json"}, "depths: none.json does not exist"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_named(parallel: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldError) as caught:
        stage_stops(_model(16), EXITS, _inference(**parallel), vocab_size=64)
    assert str(caught.value).startswith(f"inference.parallel.{said}")
