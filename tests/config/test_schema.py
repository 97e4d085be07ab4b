"""What the config tree accepts, derives and refuses, given plain Python values."""

import math
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from megatron_ee.config import Config, ExitParams, ExitsConfig, ModelConfig, SamplingParams, TrainingConfig
from megatron_ee.config.fields import Layers, NonNegativeFloat, PositiveInt, Probability

MODEL = {"num_layers": 8, "hidden_size": 96, "num_attention_heads": 4}
TRAINING = {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2}


def config(**sections: Any) -> Config:
    return Config.model_validate({"name": "run", "model": MODEL, "training": TRAINING, **sections})


@pytest.mark.parametrize("value", [True, False, 1.0, "12", None, 0, -1])
def test_integers_are_strict(value: Any) -> None:
    with pytest.raises(ValidationError):
        config(model={**MODEL, "num_layers": value})
    with pytest.raises(ValidationError):
        config(exits={"layers": [value]})


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None])
def test_booleans_are_strict(value: Any) -> None:
    with pytest.raises(ValidationError):
        config(checkpoint={"resume": value})


@pytest.mark.parametrize("value", [True, False, "0.5", None, -0.1, 1.1, float("nan"), float("inf")])
def test_thresholds_are_probabilities(value: Any) -> None:
    with pytest.raises(ValidationError):
        ExitParams(threshold=value)
    with pytest.raises(ValidationError):
        ExitParams(thresholds={6: value})


def test_an_integer_threshold_is_a_number() -> None:
    params = ExitParams.model_validate({"threshold": 1, "thresholds": {6: 0}})
    assert (repr(params.threshold), repr(params.thresholds)) == ("1.0", "{6: 0.0}")


@pytest.mark.parametrize("name", ["", "a b", "-a", ".a", "a/b", "a\n", "ä"])
def test_a_name_is_fit_for_a_folder(name: str) -> None:
    with pytest.raises(ValidationError):
        config(name=name)


def test_unknown_keys_are_refused_everywhere() -> None:
    for section in Config.model_fields:
        with pytest.raises(ValidationError):
            config(**{section: {"unknown": 1}})
    with pytest.raises(ValidationError):
        config(unknown=1)


def test_nothing_can_be_assigned() -> None:
    run = config()
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        run.model.num_layers = 1  # type: ignore[misc]


def test_the_model_derives_what_is_not_given() -> None:
    model = config().model
    assert (model.num_key_value_heads, model.head_dim, model.ffn_hidden_size) == (4, 24, 256)
    given = {"num_key_value_heads": 2, "head_dim": 8, "ffn_hidden_size": 100}
    assert ModelConfig.model_validate({**MODEL, **given}).model_dump(include=set(given)) == given


def test_exit_weights_grow_with_depth() -> None:
    assert config(exits={"layers": [2, 4]}).exits.weights == (0.25, 0.5)
    assert config(exits={"layers": [2, 4], "weights": [1, 0]}).exits.weights == (1.0, 0.0)
    assert config().exits.weights == ()


def test_all_layers_are_every_one_below_the_last() -> None:
    exits = config(exits={"layers": "all"}).exits
    assert exits.layers == tuple(range(1, 8))
    assert exits.weights == tuple(layer / 8 for layer in range(1, 8))
    assert config(model={**MODEL, "num_layers": 1}, exits={"layers": "all"}).exits.layers == ()


@pytest.mark.parametrize("curriculum", ["none", "rotational", "gradual"])
def test_layerskip_has_no_other_weights_and_is_read_back(curriculum: str) -> None:
    run = config(
        exits={"layers": "all", "layerskip": {"curriculum": curriculum}}, training={**TRAINING, "layer_dropout": {}}
    )
    assert run.exits.weights == () and run.exits.layerskip is not None
    assert run.exits.layerskip.rotation == (8 if curriculum == "rotational" else None)
    assert Config.model_validate(run.model_dump(mode="json")) == run


def test_sections_may_be_given_as_objects() -> None:
    run = Config(
        name="run",
        model=ModelConfig(num_layers=8, hidden_size=96, num_attention_heads=4),
        exits=ExitsConfig(layers=(2, 4)),
        training=TrainingConfig(train_iters=10, global_batch_size=8, micro_batch_size=2),
    )
    assert run == config(exits={"layers": [2, 4]})


def test_defaults_stand_for_all_that_is_not_said() -> None:
    run = config()
    assert (run.runs, run.device, run.seed) == ("runs", "auto", 0)
    assert (run.parallel.pipeline, run.parallel.data, run.parallel.layout) == (1, "auto", "auto")
    assert (run.data.dataset, run.data.split) == ("python-stdlib", (90.0, 5.0, 5.0))
    assert run.inference.exit == ExitParams(mode="early_exit", threshold=0.9, exits=None)


def test_a_pinned_layout_places_every_layer() -> None:
    layout = config(parallel={"pipeline": 2, "layout": [{"layers": 3}, {"layers": 5}]}).parallel.layout
    assert [stage.layers for stage in layout] == [3, 5]
    assert [(stage.exits_at_start, stage.exits_at_end) for stage in layout] == [(False, True)] * 2


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [(Layers, [1, 2], (1, 2)), (PositiveInt, 3, 3), (Probability, 1, 1.0), (NonNegativeFloat, 0, 0.0)],
)
def test_field_types_stand_alone(kind: Any, value: Any, expected: Any) -> None:
    assert TypeAdapter(kind).validate_python(value) == expected


def test_derived_fields_are_optional_in_the_json_schema() -> None:
    schema = Config.model_json_schema()
    assert schema["required"] == ["name", "model", "training"]
    assert schema["$defs"]["ModelConfig"]["required"] == ["num_layers", "hidden_size", "num_attention_heads"]


@pytest.mark.parametrize(
    ("left_end", "right_start", "whose"), [(True, True, "both"), (False, False, "neither"), (True, False, None)]
)
def test_a_border_exit_belongs_to_exactly_one_stage(left_end: bool, right_start: bool, whose: str | None) -> None:
    layout = [{"layers": 2, "exits_at_end": left_end}, {"layers": 6, "exits_at_start": right_start}]
    sections: dict[str, Any] = {"exits": {"layers": [2]}, "parallel": {"pipeline": 2, "layout": layout}}
    if whose is None:
        config(**sections)
    else:
        with pytest.raises(
            ValidationError, match=f"exit 2 is on the border of entries 0 and 1 and is given to {whose}"
        ):
            config(**sections)


def test_hidden_size_need_not_divide_over_heads_when_head_dim_is_given() -> None:
    model = {"num_layers": 1, "hidden_size": 10, "num_attention_heads": 4, "head_dim": 4}
    assert config(model=model).model.head_dim == 4


@pytest.mark.parametrize("params", [ExitParams, SamplingParams])
def test_a_request_takes_integers_for_numbers_and_nothing_else_for_them(params: type[BaseModel]) -> None:
    """In Python, where no YAML reader looks at it first; a boolean is one of Python's integers."""
    for name, field in params.model_fields.items():
        for value in (False, True, "1", math.nan):
            if (field.annotation, type(value)) in [(bool, bool), (str, str)]:
                continue
            with pytest.raises(ValidationError):
                params(**{name: value})
        if field.annotation is float:
            taken = getattr(params(**{name: 1}), name)
            assert taken == 1.0 and type(taken) is float


@pytest.mark.parametrize("value", [False, math.nan, 1.5, -0.1])
def test_the_threshold_of_one_exit_is_a_probability_too(value: float) -> None:
    with pytest.raises(ValidationError):
        ExitParams(thresholds={2: value})
    assert ExitParams(thresholds={2: 1}).thresholds == {2: 1.0}


@pytest.mark.parametrize(
    "asked", [{"exits": [2]}, {"thresholds": {5: 1.0}}, {"mode": "full"}, {"min_exit": 6}, {"patience": 3}]
)
def test_gates_are_missing_only_where_they_are_asked(asked: dict[str, Any]) -> None:
    exits = {"layers": [2, 5], "gate": ["mlp", "none"]}
    config(exits=exits, inference={"exit": {"measure": "gate", **asked}})
    with pytest.raises(ValidationError, match=r"gate, but exits.gate is none for the exits after layers \[5\]"):
        config(exits=exits, inference={"exit": {"measure": "gate"}})
