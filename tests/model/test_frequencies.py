"""Scaled rotary positions against transformers' own functions, over random settings (they compute in fp32)."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ee.config import ModelConfig
from megatron_ee.model.frequencies import attention_factor_of, frequencies_of
from megatron_ee.model.rotary import Rotary

FACTORS = st.floats(1, 64)
LENGTHS = st.integers(8, 200_000)


def _model(head_dim: int, theta: float, scaling: dict[str, Any]) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 2 * head_dim, "num_attention_heads": 2}
    return ModelConfig.model_validate({**sizes, "rope_theta": theta, "rope_scaling": scaling})


def _transformers(model: ModelConfig, scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    given = {name: value for name, value in scaling.items() if name != "kind"}
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.head_dim,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": scaling["kind"], "rope_theta": model.rope_theta, **given},
    )
    return ROPE_INIT_FUNCTIONS[scaling["kind"]](config, torch.device("cpu"))


def _assert_as_transformers(head_dim: int, theta: float, scaling: dict[str, Any], *, positions: int = 64) -> None:
    model = _model(head_dim, theta, scaling)
    expected, factor = _transformers(model, scaling)
    actual = frequencies_of(head_dim, theta, model.rope_scaling)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=2e-5, atol=0)
    assert attention_factor_of(model.rope_scaling) == pytest.approx(factor, rel=1e-12)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), expected.double())
    cosine, sine = Rotary(model).at(torch.arange(positions), torch.float32)
    torch.testing.assert_close(cosine.flatten(1), (angles.cos() * factor).float(), atol=1e-5 * positions, rtol=0)
    torch.testing.assert_close(sine.flatten(1), (angles.sin() * factor).float(), atol=1e-5 * positions, rtol=0)


HEAD_DIMS = st.integers(1, 64).map(lambda half: 2 * half)
THETAS = st.floats(2, 1e7)


@given(HEAD_DIMS, THETAS, FACTORS)
def test_linear(head_dim: int, theta: float, factor: float) -> None:
    _assert_as_transformers(head_dim, theta, {"kind": "linear", "factor": factor})


@given(HEAD_DIMS, THETAS, FACTORS, st.floats(0.1, 8), st.floats(0.5, 32), LENGTHS)
def test_llama3(head_dim: int, theta: float, factor: float, low: float, width: float, length: int) -> None:
    scaling = {
        "kind": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + width,
        "original_max_position_embeddings": length,
    }
    _assert_as_transformers(head_dim, theta, scaling)


@given(
    HEAD_DIMS,
    THETAS,
    FACTORS,
    st.floats(0.1, 8),
    st.floats(0.5, 64),
    LENGTHS,
    st.none() | st.floats(0.1, 4),
    st.booleans(),
)
def test_yarn(
    head_dim: int,
    theta: float,
    factor: float,
    slow: float,
    width: float,
    length: int,
    attention_factor: float | None,
    truncate: bool,
) -> None:
    scaling = {
        "kind": "yarn",
        "factor": factor,
        "beta_fast": slow + width,
        "beta_slow": slow,
        "original_max_position_embeddings": length,
        "attention_factor": attention_factor,
        "truncate": truncate,
    }
    ends = [
        head_dim * torch.tensor(length / (turns * 2 * torch.pi)).log().item() / (2 * torch.tensor(theta).log().item())
        for turns in (slow + width, slow)
    ]
    assume(truncate or ends[1] - ends[0] > 0.01)  # on a steeper ramp fp32 is not exact enough to compare with
    _assert_as_transformers(head_dim, theta, scaling)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (
            128,
            500000.0,
            {
                "kind": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            64,
            500000.0,
            {
                "kind": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (128, 1000000.0, {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ],
    ids=["Llama 3.1 8B", "Llama 3.2 1B", "Qwen2.5"],
)
def test_published_settings(head_dim: int, theta: float, scaling: dict[str, Any]) -> None:
    _assert_as_transformers(head_dim, theta, scaling, positions=200)
    plain = frequencies_of(head_dim, theta, None)
    scaled = frequencies_of(head_dim, theta, _model(head_dim, theta, scaling).rope_scaling)
    assert scaled[0] == plain[0], "the fastest is kept"
    assert scaled[-1] == pytest.approx(plain[-1] / scaling["factor"]), "the slowest is not"
