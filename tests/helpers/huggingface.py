"""Tiny random models of transformers', saved as folders."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral")

_OF: dict[str, dict[str, Any]] = {
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "Qwen3": {"head_dim": 16, "rms_norm_eps": 1e-6},
    "Mistral": {"sliding_window": 6},
}


def make_model(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of transformers' whose every parameter is random, norms and biases too."""
    fields = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
        **_OF[architecture],
        **changes,
    }
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**fields)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def save_model(folder: Path, architecture: str, *, shard_size: str = "5GB", **changes: Any) -> Path:
    """Its folder, as transformers writes it."""
    model = make_model(architecture, **changes)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def rewrite_config(folder: Path, **fields: Any) -> Path:
    """Change fields of config.json; what is `...` is taken out."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return folder


def tensors_of(folder: Path, pattern: str = "model*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a folder's files, by the format's own library."""
    return {name: value for path in sorted(folder.glob(pattern)) for name, value in load_file(path).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert torch.equal(ours[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name
