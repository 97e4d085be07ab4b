"""Which layers and exits each stage holds."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitsConfig, ModelConfig, ParallelConfig, StagePlacement
from megatron_ee.parallel.layout import StageLayout, place


def _model(num_layers: int) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2)


def test_border_exits_go_to_the_end_of_a_stage_and_left_over_layers_to_the_first_stages() -> None:
    layouts = place(_model(8), ExitsConfig(layers=(2, 3, 6)), ParallelConfig(pipeline=3))
    assert layouts == (StageLayout(0, 3, (2, 3)), StageLayout(3, 6, (6,)), StageLayout(6, 8, (8,)))
    assert [layout.has_embedding for layout in layouts] == [True, False, False]


def test_a_pinned_layout_may_move_a_border_exit_to_the_next_stage() -> None:
    pinned = (StagePlacement(layers=5, exits_at_end=False), StagePlacement(layers=3, exits_at_start=True))
    layouts = place(_model(8), ExitsConfig(layers=(2, 5)), ParallelConfig(pipeline=2, layout=pinned))
    assert layouts == (StageLayout(0, 5, (2,)), StageLayout(5, 8, (5, 8)))


@given(st.data())
def test_every_layer_and_every_exit_is_on_exactly_one_stage(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 40))
    stages = data.draw(st.integers(1, num_layers))
    exits = sorted(data.draw(st.sets(st.integers(1, num_layers - 1)))) if num_layers > 1 else []
    layouts = place(_model(num_layers), ExitsConfig(layers=tuple(exits)), ParallelConfig(pipeline=stages))
    assert [layer for layout in layouts for layer in range(layout.start + 1, layout.stop + 1)] == list(
        range(1, num_layers + 1)
    )
    assert [layer for layout in layouts for layer in layout.exits] == [*exits, num_layers]
    sizes = [layout.stop - layout.start for layout in layouts]
    assert max(sizes) - min(sizes) <= 1
