"""What config.json says, in transformers' old and new ways, and what is refused because our model lacks it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.huggingface import ARCHITECTURES, rewrite_config, save_model

from megatron_ee.config import ModelConfig
from megatron_ee.config.positions import LinearScaling, Llama3Scaling, YarnScaling
from megatron_ee.errors import UserError
from megatron_ee.huggingface.architecture import config_json_of, model_config_of, read_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def test_what_is_absent_is_what_transformers_takes() -> None:
    for content in (LLAMA, MISTRAL, QWEN2 | {"num_key_value_heads": None}, QWEN3):
        kept = {name: value for name, value in content.items() if name not in ("architectures", "model_type")}
        theirs = getattr(transformers, content["architectures"][0].replace("ForCausalLM", "Config"))(**kept)
        ours = read_model(content).model
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.norm_epsilon == theirs.rms_norm_eps and ours.init_std == theirs.initializer_range
        assert ours.tie_embeddings == theirs.tie_word_embeddings
        assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 500000, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, LinearScaling(kind="linear", factor=2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            5e5,
            Llama3Scaling(kind="llama3", factor=32.0),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4, "truncate": False}},
            1e6,
            YarnScaling(kind="yarn", factor=4.0, original_max_position_embeddings=2048, truncate=False),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 2.0}},
            1e4,
            YarnScaling(kind="yarn", factor=4.0, original_max_position_embeddings=2048, attention_factor=1.0),
        ),
    ],
)
def test_rotary_positions_are_read_from_both_kinds_of_config(fields: Any, theta: float, scaling: Any) -> None:
    model = read_model(LLAMA | fields).model
    assert (model.rope_theta, model.rope_scaling) == (theta, scaling)
    written = config_json_of(model, "fp32", positions=64)
    again = read_model(written).model
    assert (again.rope_theta, again.rope_scaling) == (theta, scaling)
    assert read_model(config_json_of(model, "fp32", positions=64, source=LLAMA | fields)).model == model


@pytest.mark.parametrize(
    ("fields", "window", "layers"),
    [
        (MISTRAL, 4096, "all"),
        (MISTRAL | {"sliding_window": None}, None, "all"),
        (QWEN2 | {"sliding_window": 8}, None, "all"),
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, None, "all"),
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, 8, (3, 4)),
        (QWEN3 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8, "all"),
        (
            QWEN3
            | {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            8,
            (2, 4),
        ),
    ],
)
def test_windows_hold_for_the_layers_that_the_architecture_says(fields: Any, window: Any, layers: Any) -> None:
    model = read_model(fields).model
    assert (model.sliding_window, model.sliding_window_layers) == (window, layers)
    assert read_model(config_json_of(model, "fp32", positions=64)).model == model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 'architectures is ["GPT2LMHeadModel"]: only one of LlamaForCausalLM'),
        ({"architectures": None, "model_type": "gpt2"}, "architectures is null"),
        ({"model_type": "mistral"}, 'model_type is "mistral": not that of LlamaForCausalLM'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}'),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "code of the model's own is not run"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters: partial_rot"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling: type is "dynamic"'),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, 'rope_scaling: rope_type is "longrope"'),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling: factor is 0.5: below 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 1}}, "rope_scaling: alpha is 1: not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear": not an object'),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"torch_dtype": "float64"}, 'torch_dtype is "float64"'),
        ({"num_hidden_layers": "4"}, 'num_hidden_layers is "4": not a positive whole number'),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rms_norm_eps": True}, "rms_norm_eps is true: not a positive number"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"'),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 must divide num_attention_heads = 4"),
        ({"head_dim": 7}, "head_dim: 7 must be even"),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types is",
        ),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, "layer_types is"),
    ],
)
def test_what_the_model_lacks_is_refused_by_name_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_model(LLAMA | fields, "x/config.json")
    assert str(raised.value).startswith("x/config.json: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"], ids=["gone", "cut off", "a list", "no text"])
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"config\.json: "):
        model_config_of(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_still_fits_is_written_as_it_was(tmp_path: Path, architecture: str) -> None:
    folder = rewrite_config(save_model(tmp_path, architecture), of_its_own=[1])
    found = model_config_of(folder)
    assert found.architecture == f"{architecture}ForCausalLM" and found.precision == "fp32"
    assert config_json_of(found.model, "fp32", positions=64, source=found.config) == found.config
    windows = (3,) if architecture == "Qwen2" else found.model.sliding_window_layers
    shorter = found.model.model_copy(update={"num_layers": 3, "init_std": 0.5, "sliding_window_layers": windows})
    written = config_json_of(shorter, "bf16", positions=64, source=found.config)
    assert read_model(written).model == shorter and written["dtype"] == "bfloat16"
    assert {"of_its_own": [1], "bos_token_id": 1}.items() <= written.items()
    changed = {name for name in written if written[name] != found.config.get(name)}
    assert changed <= {"num_hidden_layers", "initializer_range", "dtype", "layer_types"}


def _model(**fields: Any) -> ModelConfig:
    small: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    return ModelConfig(**small | fields)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"num_attention_heads": 3, "head_dim": 8}, "MistralForCausalLM"),
        ({"sliding_window": 8}, "MistralForCausalLM"),
        ({"qkv_bias": True}, "Qwen2ForCausalLM"),
        ({"qkv_bias": True, "sliding_window": 8}, "Qwen2ForCausalLM"),
        ({"qk_norm": True, "sliding_window": 8, "sliding_window_layers": (1,)}, "Qwen3ForCausalLM"),
    ],
)
def test_a_model_of_ours_is_of_the_class_that_computes_the_same(fields: Any, architecture: str) -> None:
    model = _model(**fields)
    written = config_json_of(model, "fp32", positions=77, source=LLAMA | {"bos_token_id": 5, "extra": 1})
    assert written["architectures"] == [architecture]
    assert written["bos_token_id"] == 5 and written["max_position_embeddings"] == 77
    again = read_model(json.loads(json.dumps(written)))
    assert again.model == model.model_copy(update={"max_position_embeddings": 77})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "model.qkv_bias with model.qk_norm"),
        ({"sliding_window": 8, "sliding_window_layers": (2,)}, r"model.sliding_window_layers: \[2\]"),
    ],
)
def test_what_no_architecture_has_is_refused_by_name(fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_json_of(_model(**fields), "fp32", positions=64)
