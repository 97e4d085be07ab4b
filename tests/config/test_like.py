"""`model: {like: FOLDER}`: fields that are another model's, word for word what is said when they cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ee.checkpoint.description import Description, Progress, write_description
from megatron_ee.checkpoint.folders import step_folder
from megatron_ee.checkpoint.models import read_model
from megatron_ee.config import Config, ConfigError, ExitsConfig, ModelConfig, load_config, open_config, to_yaml
from megatron_ee.errors import FieldError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 321,
    "rope_theta": 500000.0,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.01,
}
TRAINING = "training: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2}\ndata: {sequence_length: 16}\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama").mkdir()
    Path("llama/config.json").write_text(json.dumps(LLAMA))


def _write(text: str) -> None:
    Path("run.yaml").write_text(f"name: run\n{TRAINING}{text}\n")


def _problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", overrides, read_model=read_model)
    return caught.value.problems


def test_all_fields_are_the_folders_and_explicit() -> None:
    _write("model: {like: llama}\nexits: {layers: all}")
    config = load_config("run.yaml", read_model=read_model)
    model = config.model
    assert (model.num_layers, model.vocab_size, model.rope_theta, model.init_std) == (6, 321, 500000.0, 0.01)
    assert config.exits.layers == (1, 2, 3, 4, 5)
    text = to_yaml(config)
    assert "like" not in text
    Path("resolved.yaml").write_text(text)
    assert load_config("resolved.yaml") == config, "no folder is needed any more"


def test_what_says_nothing_of_parameters_may_differ_and_the_rest_may_be_repeated() -> None:
    _write("model:\n  like: llama\n  num_layers: 6\n  rope_theta: 5e5\n  init_std: 0.5\n  max_position_embeddings: 64")
    model = load_config("run.yaml", read_model=read_model).model
    assert (model.init_std, model.max_position_embeddings, model.num_layers) == (0.5, 64, 6)


def test_a_run_of_ours_is_taken_with_its_resolved_vocabulary() -> None:
    model = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4)
    description = Description(model, ExitsConfig(), "fp32", "bytes", 320, Progress(1, 8))
    step = step_folder(Path("runs/mine"), 1)
    step.mkdir(parents=True)
    write_description(step, description)
    for folder in ("runs/mine", str(step)):
        _write(f"model: {{like: {folder}}}")
        assert load_config("run.yaml", read_model=read_model).model == model.model_copy(update={"vocab_size": 320})


def test_it_works_as_an_override_and_in_a_base() -> None:
    _write("seed: 1")
    assert load_config("run.yaml", ["model.like=llama"], read_model=read_model).model.num_layers == 6
    Path("run.yaml").rename("base.yaml")
    Path("run.yaml").write_text("base: base.yaml\nmodel: {like: llama}\n")
    assert load_config("run.yaml", read_model=read_model).model.num_layers == 6


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("model: {like: llama, num_layers: 8}", ["4:22: model.num_layers: 8 is not 6, which llama has (model.like)"]),
        (
            "model:\n  hidden_size: 64\n  like: llama\n  tie_embeddings: true",
            [
                "5:3: model.hidden_size: 64 is not 32, which llama has (model.like)",
                "7:3: model.tie_embeddings: true is not false, which llama has (model.like)",
            ],
        ),
        (
            "model: {like: llama, vocab_size: auto}",
            ["4:22: model.vocab_size: 'auto' is not 321, which llama has (model.like)"],
        ),
        ("model: {like: llama, num_layers: six}", ["4:22: model.num_layers: 'six' is not an integer"]),
        ("model: {like: llama, layers: 8}", ["4:22: model.layers: unknown key, did you mean 'num_layers'?"]),
        ("model: {like: 3}", ["4:9: model.like: 3 is not a string"]),
        (
            "seed: x\nmodel: {like: nowhere}",
            ["4:1: seed: 'x' is not an integer", "5:9: model.like: nowhere is not a folder"],
        ),
        ('model: {like: "\\0"}', [r"4:9: model.like: \x00 is not a folder"]),
        (
            "model: {like: .}",
            [
                "4:9: model.like: . is neither a run with a whole checkpoint nor a step folder (no format.json) nor a "
                "Hugging Face folder (no config.json)"
            ],
        ),
        (
            "model: {like: llama}\nparallel: {tensor: 2}",
            ["4:9: model.vocab_size: 321 doesn't divide over parallel.tensor = 2 ranks"],
        ),
        (
            "model: {like: llama}\nexits: {layers: [6]}",
            ["5:18: exits.layers.0: 6 must be below num_layers = 6: the last layer's exit is built in"],
        ),
    ],
)
def test_what_is_wrong_is_said_where_it_is_written(text: str, messages: list[str]) -> None:
    _write(text)
    assert _problems() == [f"run.yaml:{message}" for message in messages]


def test_what_is_wrong_with_the_folder_is_said_at_the_field() -> None:
    _write("model: {like: llama}")
    Path("llama/config.json").write_text(json.dumps({**LLAMA, "mlp_bias": True}))
    (problem,) = _problems()
    assert problem.startswith("run.yaml:4:9: model.like: llama/config.json: mlp_bias ")
    Path("llama/config.json").write_text("{")
    (problem,) = _problems()
    assert problem.startswith("run.yaml:4:9: model.like: llama/config.json: not JSON")


def test_an_override_that_disagrees_is_named_itself() -> None:
    _write("model: {like: llama}")
    assert _problems("model.num_layers=8") == [
        "override 'model.num_layers=8': model.num_layers: 8 is not 6, which llama has (model.like)"
    ]
    _write("model: {num_layers: 8}")
    assert _problems("model.like=llama") == ["run.yaml:4:9: model.num_layers: 8 is not 6, which llama has (model.like)"]
    assert _problems("model.like=nowhere") == ["override 'model.like=nowhere': model.like: nowhere is not a folder"]


def test_what_a_use_finds_is_said_at_the_name_of_the_folder() -> None:
    _write("model: {like: llama}")
    with pytest.raises(ConfigError) as caught, open_config("run.yaml", read_model=read_model):
        raise FieldError("model.vocab_size", "no")
    assert caught.value.problems == ["run.yaml:4:9: model.vocab_size: no"]


def test_who_reads_no_models_says_so() -> None:
    _write("model: {like: llama}")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert caught.value.problems == ["run.yaml:4:9: model.like: is not read here: give the fields of the model"]


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a model, with all that may be null."""
    small, numbers = st.integers(1, 8), st.floats(1e-6, 1e6)
    num_layers, has_window = draw(small), draw(st.booleans())
    scaling = st.fixed_dictionaries({"kind": st.just("linear"), "factor": st.floats(1, 64)})
    return {
        "num_layers": num_layers,
        "hidden_size": draw(small) * 8,
        "num_attention_heads": 4,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": 2 * draw(small),
        "vocab_size": draw(st.integers(1, 10**6)),
        "tie_embeddings": draw(st.booleans()),
        "rope_theta": draw(numbers),
        "rope_scaling": draw(st.one_of(st.none(), scaling)),
        "max_position_embeddings": draw(st.one_of(st.none(), st.integers(16, 64))),
        "qk_norm": draw(st.booleans()),
        "sliding_window": draw(small) if has_window else None,
        "sliding_window_layers": (num_layers,) if has_window and draw(st.booleans()) else "all",
        "norm_epsilon": draw(numbers),
    }


@given(models(), st.data())
@settings(max_examples=50)
def test_a_resolved_config_reads_back_equal_and_only_what_differs_is_refused(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    model = ModelConfig.model_validate(fields)
    Path("run.yaml").write_text(f"name: run\n{TRAINING}model: {{like: it}}\n")
    config = load_config("run.yaml", read_model=lambda _folder: model)
    assert config.model == model
    Path("run.yaml").write_text(to_yaml(config))
    assert load_config("run.yaml") == config
    # all of it repeated beside the name
    assert load_config("run.yaml", ["model.like=it"], read_model=lambda _folder: model) == config
    other = ModelConfig.model_validate(data.draw(models()))
    different = {name for name, value in other if value != getattr(model, name) and name != "init_std"}
    different -= {"max_position_embeddings"}
    problems = []
    try:
        _load_like(config, other)
    except ConfigError as error:
        problems = error.problems
    assert {problem.split(": ")[1].removeprefix("model.") for problem in problems} == different


def _load_like(config: Config, other: ModelConfig) -> Config:
    Path("run.yaml").write_text(to_yaml(config))
    return load_config("run.yaml", ["model.like=it"], read_model=lambda _folder: other)


@given(st.text())
@example("a" * 5000)
@settings(max_examples=50)
def test_any_folder_is_read_or_explained(folder: str) -> None:
    Path("run.yaml").write_text(
        f"name: run\n{TRAINING}model: {{num_layers: 1, hidden_size: 2, num_attention_heads: 1}}"
    )
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", [f"model.like={json.dumps(folder)}"], read_model=read_model)
    assert caught.value.problems
    assert all(problem.isprintable() for problem in caught.value.problems)
