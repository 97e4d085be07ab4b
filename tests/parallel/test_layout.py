"""Which layers and exits each stage holds."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitsConfig, ModelConfig, ParallelConfig, StagePlacement, load_config
from megatron_ee.parallel.chunks import Chunk, have_exits
from megatron_ee.parallel.costs import ModelCosts, costs_of
from megatron_ee.parallel.layout import describe_layout, layout_of, place

FREE_EXITS = ModelCosts(1.0, 2.0, 0.0, 0.0, exits={"norm": 0.0, "mlp": 0.0, "block": 0.0})
EXITS = ModelCosts(1.0, 2.0, 0.0, 0.0, exits={"norm": 3.0, "mlp": 4.0, "block": 6.0})


def _model(num_layers: int) -> ModelConfig:
    return ModelConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2)


def test_border_exits_go_to_the_end_of_a_stage_and_left_over_layers_to_the_first_stages() -> None:
    layout = place(_model(8), ExitsConfig(layers=(2, 3, 6)), ParallelConfig(pipeline=3), FREE_EXITS)
    assert layout == ((Chunk(0, 3, (2, 3)),), (Chunk(3, 6, (6,)),), (Chunk(6, 8, (8,)),))
    assert [chunk.has_embedding for (chunk,) in layout] == [True, False, False]


def test_with_chunks_the_model_goes_round_the_stages() -> None:
    parallel = ParallelConfig(pipeline=2, chunks=2, schedule="interleaved")
    layout = place(_model(8), ExitsConfig(layers=(2, 5)), parallel, FREE_EXITS)
    assert layout == ((Chunk(0, 2, (2,)), Chunk(4, 6, (5,))), (Chunk(2, 4, ()), Chunk(6, 8, (8,))))
    assert have_exits(layout) == [True, False, True, True], "in the model's order"


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
    heads = tuple(data.draw(st.sampled_from(("norm", "mlp", "block"))) for _ in exits)
    config = ExitsConfig(layers=tuple(exits), head=heads)
    costs = data.draw(st.sampled_from((FREE_EXITS, EXITS)))
    layout = place(_model(num_layers), config, ParallelConfig(pipeline=stages, chunks=rounds), costs)
    assert [len(chunks) for chunks in layout] == [rounds] * stages
    in_order = [chunk for same_round in zip(*layout, strict=True) for chunk in same_round]
    assert [layer for chunk in in_order for layer in range(chunk.start + 1, chunk.stop + 1)] == list(
        range(1, num_layers + 1)
    )
    assert [layer for chunk in in_order for layer in chunk.exits] == [*exits, num_layers]
    assert not [chunk for chunk in in_order if chunk.start in chunk.exits and config.head_of(chunk.start) == "mlp"]


def test_heads_are_weighed_by_their_kind() -> None:
    exits = ExitsConfig(layers=(1, 2), head=("norm", "block"))
    layout = place(_model(8), exits, ParallelConfig(pipeline=2), EXITS)  # 6 layers of 3 and the final exit: 3 more
    assert layout == ((Chunk(0, 3, (1, 2)),), (Chunk(3, 8, (8,)),))
    exits = ExitsConfig(layers=(1, 2))
    assert place(_model(8), exits, ParallelConfig(pipeline=2), EXITS)[0] == (Chunk(0, 4, (1, 2)),)


def test_a_line_says_what_each_stage_has() -> None:
    parallel = ParallelConfig(pipeline=2, chunks=2, schedule="interleaved")
    exits = ExitsConfig(layers=(2, 3))
    layout = ((Chunk(0, 2, (2,)), Chunk(3, 5, ())), (Chunk(2, 3, (3,)), Chunk(5, 8, (8,))))
    pinned = tuple(StagePlacement(layers=layers) for layers in (2, 1, 2, 3))
    assert place(_model(8), exits, parallel.model_copy(update={"layout": pinned})) == layout
    assert describe_layout(layout, exits, EXITS) == [
        "stage 0: layers 1-2 4-5, exits 2, 83.3% of the slowest stage's work, 45.5% of all",
        "stage 1: layers 3 6-8, exits 3 final, 100.0% of the slowest stage's work, 54.5% of all",
    ]
    assert (
        describe_layout(((Chunk(0, 4, ()),), (Chunk(4, 8, (8,)),)), ExitsConfig(), EXITS)[0].split(", ")[1]
        == "no exits"
    )


def test_the_demo_is_balanced() -> None:
    config = load_config(Path(__file__).parents[2] / "configs/train/demo.yaml")
    lines = describe_layout(layout_of(config, 320), config.exits, costs_of(config, 320))
    assert [line.split(",")[0] for line in lines] == ["stage 0: layers 1-6", "stage 1: layers 7-12"]
    assert all("100.0% of the slowest" in line for line in lines)
