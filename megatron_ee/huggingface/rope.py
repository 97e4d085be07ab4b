"""Rotary positions, as config.json describes them: in the fields rope_theta and rope_scaling, or in rope_parameters.

transformers 5 writes the latter and reads both; what is written here is the former, which every release reads.
"""

import math
from typing import Any

from megatron_ee.config.positions import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from megatron_ee.huggingface.settings import Settings

_THETA = 10000.0
_KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "mscale",
        "mscale_all_dim",
        "finetuned",  # of YaRN's own configs: how the model came about
    },
}
"""Kind -> what it may say, beside the fields of all kinds."""

_OF_ALL = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}


def rope_of(settings: Settings) -> tuple[float, RopeScaling | None]:
    """The base of the angles, and how they are scaled.

    Raises:
        UserError: it is of a kind that the model lacks, or says what its kind does not know.
    """
    # of the two, transformers takes this one
    rope = settings.inner("rope_scaling") or settings.inner("rope_parameters") or Settings({}, "")
    theta = next((of.number("rope_theta") for of in (rope, settings) if of.get("rope_theta") is not None), _THETA)
    for of in (rope, settings):
        if of.get("partial_rotary_factor") not in (None, 1):
            raise of.refusal("partial_rotary_factor", "all channels of a head turn here, which is 1.0")
    name = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(name) or "default"
    if kind not in _KNOWN:
        raise rope.refusal(name, f"only {', '.join(_KNOWN)} are known")
    for field in rope.names():
        if field not in _KNOWN[kind] | _OF_ALL:
            raise rope.refusal(field, f"not known of rope type {kind!r}")
    match kind:
        case "linear":
            return theta, LinearScaling(kind="linear", factor=_factor(rope))
        case "llama3":
            return theta, _llama3(rope, settings)
        case "yarn":
            return theta, _yarn(rope, settings)
    return theta, None


def rope_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The fields of config.json that `rope_of` reads back."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    values = {name: value for name, value in scaling if name != "kind" and value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **values}}


def _llama3(rope: Settings, settings: Settings) -> RopeScaling:
    return Llama3Scaling(
        kind="llama3",
        factor=_factor(rope),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=_original_positions(rope, settings),
    )


def _yarn(rope: Settings, settings: Settings) -> RopeScaling:
    original = _original_positions(rope, settings)
    factor = settings.whole("max_position_embeddings") / original if rope.get("factor") is None else _factor(rope)
    attention_factor = rope.number("attention_factor") if rope.get("attention_factor") is not None else None
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        of_attention, of_all = (_attention_scale(factor, rope.number(name)) for name in ("mscale", "mscale_all_dim"))
        attention_factor = of_attention / of_all
    return YarnScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast") if rope.get("beta_fast") else 32.0,
        beta_slow=rope.number("beta_slow") if rope.get("beta_slow") else 1.0,
        attention_factor=attention_factor,
        truncate=rope.get("truncate") is None or rope.flag("truncate"),
    )


def _attention_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _factor(rope: Settings) -> float:
    if (factor := rope.number("factor")) < 1:
        raise rope.refusal("factor", "below 1")
    return factor


def _original_positions(rope: Settings, settings: Settings) -> int:
    """transformers takes the field of the whole config where there is one, and the longest sequence where none is."""
    if settings.get("original_max_position_embeddings") is not None:
        return settings.whole("original_max_position_embeddings")
    if rope.get("original_max_position_embeddings") is not None:
        return rope.whole("original_max_position_embeddings")
    return settings.whole("max_position_embeddings")
