"""Which models of Hugging Face's are models of ours, and config.json both ways.

What a model's config asks for, and ours doesn't have, is refused by its name: a model that computes something else
than it did would be worse than none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_ee.config import ModelConfig, Precision
from megatron_ee.errors import UserError
from megatron_ee.huggingface.rope import rope_fields, rope_of
from megatron_ee.huggingface.settings import CONFIG_FILE, Settings, read_json

_LARGE = {"max_position_embeddings": 32768}
_QWEN: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, **_LARGE}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "max_position_embeddings": 2048},
    "Qwen2ForCausalLM": {"model_type": "qwen2", **_QWEN},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 128, **_QWEN},
    "MistralForCausalLM": {
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}
"""Name -> what transformers takes where its config.json is silent."""

_OF_ALL = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu"}

_PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_WITH_WINDOWS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")
"""Fields that every architecture has, and our model does not."""


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """What a config.json says.

    Attributes:
        architecture: the class in transformers.
        model: in our terms, its vocabulary resolved.
        precision: in which its parameters are said to be; None: nothing is said.
        config: the file's content.
    """

    architecture: str
    model: ModelConfig
    precision: Precision | None
    config: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        assert isinstance(self.model.vocab_size, int)
        return self.model.vocab_size


def model_config_of(folder: Path) -> HuggingFaceModel:
    """What the config.json of a model's folder says.

    Raises:
        UserError: there is none, the architecture is not known, or it asks for what our model lacks.
    """
    path = folder / CONFIG_FILE
    return read_model(read_json(path), str(path))


def read_model(config: Mapping[str, Any], where: str = CONFIG_FILE) -> HuggingFaceModel:
    """The content of a config.json, in our terms; see `model_config_of`."""
    architecture = _architecture(Settings(config, where))
    settings = Settings(config, where, {**_OF_ALL, **ARCHITECTURES[architecture]})
    _refuse_what_is_lacking(settings)
    window, window_layers = _window(settings, architecture)
    fields = {
        "num_layers": settings.whole("num_hidden_layers"),
        "hidden_size": settings.whole("hidden_size"),
        "num_attention_heads": settings.whole("num_attention_heads"),
        "ffn_hidden_size": settings.whole("intermediate_size"),
        "vocab_size": settings.whole("vocab_size"),
        "tie_embeddings": settings.flag("tie_word_embeddings"),
        "max_position_embeddings": settings.whole("max_position_embeddings"),
        "qkv_bias": architecture == "Qwen2ForCausalLM",
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "sliding_window": window,
        "sliding_window_layers": window_layers,
        "norm_epsilon": settings.number("rms_norm_eps"),
        "init_std": settings.number("initializer_range"),
        **{name: settings.whole(name) for name in ("num_key_value_heads", "head_dim") if settings.get(name)},
    }
    try:
        rope_theta, rope_scaling = rope_of(settings)
        model = ModelConfig.model_validate(fields | {"rope_theta": rope_theta, "rope_scaling": rope_scaling})
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    return HuggingFaceModel(architecture, model, _precision(settings), MappingProxyType(dict(config)))


def config_json_of(
    model: ModelConfig, precision: Precision, *, positions: int, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config.json for a model: the class in transformers that computes the same, and its fields.

    Args:
        model: its vocabulary resolved.
        positions: the longest sequence, where `model` doesn't say.
        source: the config.json that the model came with, if any; what it says beside, or in other words, stays.

    Raises:
        UserError: no architecture has all that the model has; it names what has no place.
    """
    model = model.model_copy(update={"max_position_embeddings": model.max_position_embeddings or positions})
    of_source = read_model(source) if source is not None else None
    if source is not None and of_source is not None and _fits(of_source.architecture, model):
        before, after = _fields(of_source.architecture, of_source.model), _fields(of_source.architecture, model)
        changed = {name: value for name, value in after.items() if before[name] != value}
        if not changed.keys().isdisjoint(rope := rope_fields(model.rope_theta, model.rope_scaling)):
            changed |= rope
        config = {name: value for name, value in source.items() if not _is_outdated(name, changed)} | changed
    else:
        architecture = _choose(model)
        config = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture]["model_type"]}
        config |= {name: source[name] for name in _KEPT if source is not None and name in source}
        config |= _fields(architecture, model)
    of_dtype = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return config | dict.fromkeys(of_dtype, dtype_name(precision))


def dtype_name(precision: Precision) -> str:
    """As torch calls it: float32."""
    return next(name for name, of in _PRECISIONS.items() if of == precision)


def _architecture(settings: Settings) -> str:
    names = settings.get("architectures")
    types = {fields["model_type"]: name for name, fields in ARCHITECTURES.items()}
    if names is None and settings.get("model_type") in types:
        return types[settings.get("model_type")]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise settings.refusal("architectures", f"only one of {', '.join(ARCHITECTURES)} can be read")
    if settings.get("model_type") not in (None, ARCHITECTURES[names[0]]["model_type"]):
        raise settings.refusal("model_type", f"not that of {names[0]}")
    return str(names[0])


def _refuse_what_is_lacking(settings: Settings) -> None:
    lacking = {
        "auto_map": "code of the model's own is not run",
        "quantization_config": "quantised parameters cannot be read",
        "compression_config": "quantised parameters cannot be read",
    }
    for name, reason in lacking.items():
        if settings.get(name) is not None:
            raise settings.refusal(name, reason)
    if settings.get("hidden_act") != "silu":
        raise settings.refusal("hidden_act", "the model has SwiGLU, which is silu")
    if settings.flag("mlp_bias"):
        raise settings.refusal("mlp_bias", "the model's MLPs have no bias")
    if settings.flag("attention_bias"):
        raise settings.refusal("attention_bias", "the model's attention has no bias at its output")
    if settings.get("pretraining_tp") not in (None, 1):
        raise settings.refusal("pretraining_tp", "products in pieces are not supported, only 1")


def _window(settings: Settings, architecture: str) -> tuple[int | None, tuple[int, ...] | str]:
    """The window, and for which layers it holds."""
    if architecture == "LlamaForCausalLM":
        if settings.get("layer_types") and set(settings.get("layer_types")) != {"full_attention"}:
            raise settings.refusal("layer_types", "Llama's attention knows no other than full_attention")
        return None, "all"
    if architecture in _WITH_WINDOWS:
        return _qwen_window(settings)
    window = settings.whole("sliding_window") if settings.get("sliding_window") is not None else None
    return window, "all"


def _qwen_window(settings: Settings) -> tuple[int | None, tuple[int, ...] | str]:
    num_layers, types = settings.whole("num_hidden_layers"), settings.get("layer_types")
    slides = settings.flag("use_sliding_window")
    if types is None:
        first = settings.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise settings.refusal("max_window_layers", "not a whole number")
        types = ["sliding_attention" if slides and layer >= first else "full_attention" for layer in range(num_layers)]
    known = {"full_attention", "sliding_attention"} if slides else {"full_attention"}
    if not isinstance(types, list) or len(types) != num_layers or not set(map(str, types)) <= known:
        raise settings.refusal("layer_types", f"{num_layers} of {', '.join(sorted(known))} are needed")
    layers = tuple(layer for layer, kind in enumerate(types, start=1) if kind == "sliding_attention")
    if not layers:
        return None, "all"
    return settings.whole("sliding_window"), "all" if len(layers) == num_layers else layers


def _precision(settings: Settings) -> Precision | None:
    name = "dtype" if settings.get("dtype") is not None else "torch_dtype"
    if (dtype := settings.get(name)) is None:
        return None
    if dtype not in _PRECISIONS:
        raise settings.refusal(name, f"only {', '.join(_PRECISIONS)} can be read")
    return _PRECISIONS[dtype]


def _reason(error: ValueError) -> str:
    """What is wrong between fields, in one line; pydantic says it in several."""
    found = [str(details["msg"]).removeprefix("Value error, ") for details in getattr(error, "errors", list)()]
    return "; ".join(found) or str(error)


def _fits(architecture: str, model: ModelConfig) -> bool:
    """Whether an architecture has what the model has, and nothing else."""
    windows = model.sliding_window is not None
    on_all = windows and model.sliding_window_layers == "all"
    divides = model.hidden_size % model.num_attention_heads == 0  # which transformers wants of a Llama
    match architecture:
        case "LlamaForCausalLM":
            return not (model.qkv_bias or model.qk_norm or windows) and divides
        case "MistralForCausalLM":
            return not (model.qkv_bias or model.qk_norm) and (on_all or not windows)
        case "Qwen2ForCausalLM":
            return model.qkv_bias and not model.qk_norm
        case _:
            return model.qk_norm and not model.qkv_bias


def _choose(model: ModelConfig) -> str:
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        if _fits(architecture, model):
            return architecture
    if model.qkv_bias:
        raise UserError("model.qkv_bias with model.qk_norm: no architecture of transformers' has both")
    raise UserError(
        f"model.sliding_window_layers: {list(model.sliding_window_layers)}: without biases or normalised queries no "
        f"architecture of transformers' has a window on some layers"
    )


def _fields(architecture: str, model: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model whose longest sequence is known."""
    fields: dict[str, Any] = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "silu",
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        **rope_fields(model.rope_theta, model.rope_scaling),
    }
    if architecture == "LlamaForCausalLM":
        return fields | {"attention_bias": False, "mlp_bias": False}
    fields["sliding_window"] = model.sliding_window
    if architecture in _WITH_WINDOWS:
        windows = [model.window_of(layer) for layer in range(1, model.num_layers + 1)]
        fields["use_sliding_window"] = any(windows)
        fields["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    return fields


def _is_outdated(name: str, changed: Mapping[str, Any]) -> bool:
    """Whether a field of the source says in other words what has changed."""
    return name in ("rope_parameters", "original_max_position_embeddings") and "rope_scaling" in changed
