"""Which layers and exits each stage holds."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitsConfig, ModelConfig, ParallelConfig, StagePlacement
from megatron_ee.parallel.layout import Chunk, have_exits, place, stages_with_exits


def _model(num_layers: int) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2)


def test_border_exits_go_to_the_end_of_a_stage_and_left_over_layers_to_the_first_stages() -> None:
    layout = place(_model(8), ExitsConfig(layers=(2, 3, 6)), ParallelConfig(pipeline=3))
    assert layout == ((Chunk(0, 3, (2, 3)),), (Chunk(3, 6, (6,)),), (Chunk(6, 8, (8,)),))
    assert [chunk.has_embedding for (chunk,) in layout] == [True, False, False]


def test_with_chunks_the_model_goes_round_the_stages() -> None:
    layout = place(_model(8), ExitsConfig(layers=(2, 5)), ParallelConfig(pipeline=2, chunks=2, schedule="interleaved"))
    assert layout == ((Chunk(0, 2, (2,)), Chunk(4, 6, (5,))), (Chunk(2, 4, ()), Chunk(6, 8, (8,))))
    assert have_exits(layout) == [True, False, True, True], "in the model's order"
    assert stages_with_exits(layout) == [0, 1]


def test_a_pinned_layout_may_move_a_border_exit_to_the_next_stage() -> None:
    pinned = (StagePlacement(layers=5, exits_at_end=False), StagePlacement(layers=3, exits_at_start=True))
    layout = place(_model(8), ExitsConfig(layers=(2, 5)), ParallelConfig(pipeline=2, layout=pinned))
    assert layout == ((Chunk(0, 5, (2,)),), (Chunk(5, 8, (5, 8)),))


@given(st.data())
def test_every_layer_and_every_exit_is_on_exactly_one_stage(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 40))
    stages = data.draw(st.integers(1, num_layers))
    rounds = data.draw(st.integers(1, num_layers // stages))
    exits = sorted(data.draw(st.sets(st.integers(1, num_layers - 1)))) if num_layers > 1 else []
    layout = place(_model(num_layers), ExitsConfig(layers=tuple(exits)), ParallelConfig(pipeline=stages, chunks=rounds))
    assert [len(chunks) for chunks in layout] == [rounds] * stages
    in_order = [chunk for same_round in zip(*layout, strict=True) for chunk in same_round]
    assert [layer for chunk in in_order for layer in range(chunk.start + 1, chunk.stop + 1)] == list(
        range(1, num_layers + 1)
    )
    assert [layer for chunk in in_order for layer in chunk.exits] == [*exits, num_layers]
    sizes = [chunk.stop - chunk.start for chunk in in_order]
    assert max(sizes) - min(sizes) <= 1
