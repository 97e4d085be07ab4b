"""Rules of serving: what a request's settings, and the server's own, have to keep to under `serving.bounds`."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from megatron_ee.config.inference import ExitParams, InferenceConfig, SamplingParams
    from megatron_ee.config.schema import Config
    from megatron_ee.config.serving import BoundsConfig

Problems = Iterator[tuple[str, str]]

# No server needs them wider. Beyond, logits in fp32 become infinite, and no token can be chosen.
_LARGEST_BIAS = 100.0
_HOTTEST = 100.0
_REPETITION = (0.01, 100.0)
_LARGEST_ALPHA = 100.0
_LARGEST_LOGIT = 1e30


def serving_problems(config: "Config") -> Problems:
    """Of a config that says what it wants of requests; one that says nothing is checked when it is served."""
    bounds = config.serving.bounds
    if bounds == type(bounds)():
        return
    if bounds.threshold > 0 and bounds.measures is None:
        yield (
            "serving.bounds.measures",
            f"null, but a threshold of {bounds.threshold} is another limit for each measure: name those that may be "
            f"asked for, as [{config.inference.exit.measure}]",
        )
    yield from own_problems(bounds, config.inference)


def own_problems(bounds: "BoundsConfig", inference: "InferenceConfig") -> Problems:
    """What of the server's own settings no request could fall back on, in any mode that it may ask for."""
    found: dict[tuple[str, str], None] = {}
    for mode in get_args(type(inference.exit).model_fields["mode"].annotation):
        if mode == inference.exit.mode or bounds.modes is None or mode in bounds.modes:
            exit = inference.exit.model_copy(update={"mode": mode})
            found.update(dict.fromkeys(exit_bound_problems(bounds, exit)))
    found.update(dict.fromkeys(sampling_bound_problems(bounds, inference.sampling)))
    yield from found


def sampling_bound_problems(bounds: "BoundsConfig", params: "SamplingParams") -> Problems:
    """What is out of bounds; all else that sampling knows costs the same whatever its value."""
    for field, value, bound in (
        ("max_new_tokens", params.max_new_tokens, "new_tokens"),
        ("logprobs", params.logprobs or 0, "logprobs"),
        ("logit_bias", len(params.logit_bias), "biases"),
        ("stop", len(params.stop), "stops"),
        ("stop", max(map(len, params.stop), default=0), "stop_characters"),
        ("stop_token_ids", len(params.stop_token_ids), "stops"),
    ):
        if value > getattr(bounds, bound):
            yield f"inference.sampling.{field}", _above(value, bounds, bound)
    for token, bias in params.logit_bias.items():
        if abs(bias) > _LARGEST_BIAS:
            yield f"inference.sampling.logit_bias.{token}", _outside(bias, -_LARGEST_BIAS, _LARGEST_BIAS)
    if params.temperature > _HOTTEST:
        yield "inference.sampling.temperature", _outside(params.temperature, 0, _HOTTEST)
    if not _REPETITION[0] <= params.repetition_penalty <= _REPETITION[1]:
        yield "inference.sampling.repetition_penalty", _outside(params.repetition_penalty, *_REPETITION)


def exit_bound_problems(bounds: "BoundsConfig", params: "ExitParams") -> Problems:
    """What is out of bounds. Full depth never is; of other modes, what they use is looked at."""
    yield from ((f"inference.exit.{field}", message) for field, message in _exit_problems(bounds, params))


def _exit_problems(bounds: "BoundsConfig", params: "ExitParams") -> Problems:
    for field, layers in (
        ("exits", params.exits),
        ("sled.layers", params.sled.layers),
        ("dola.layers", params.dola.layers),
    ):
        if layers is not None and len(set(layers)) < len(layers):
            yield field, "names an exit twice"
    if params.mode == "full":
        return
    yield from _among("mode", params.mode, bounds, "modes")
    if params.mode in ("early_exit", "speculative"):
        yield from _among("kv_policy", params.kv_policy, bounds, "kv_policies")
        if params.max_pending < bounds.max_pending:
            yield "max_pending", _below(params.max_pending, bounds, "max_pending")
    match params.mode:
        case "early_exit":
            yield from _leaving_problems(bounds, params)
        case "speculative":
            if params.draft_length != "auto" and params.draft_length > bounds.draft_length:
                yield "draft_length", _above(params.draft_length, bounds, "draft_length")
        case "sled":
            yield from _sled_problems(bounds, params)
        case "dola":
            yield from _logit_problems("dola.lower_bound", params.dola.lower_bound)


def _leaving_problems(bounds: "BoundsConfig", params: "ExitParams") -> Problems:
    yield from _among("measure", params.measure, bounds, "measures")
    thresholds: Mapping[str, float] = {
        "threshold": params.threshold,
        **{f"thresholds.{layer}": threshold for layer, threshold in params.thresholds.items()},
    }
    for field, threshold in thresholds.items():
        if threshold < bounds.threshold:
            yield field, _below(threshold, bounds, "threshold")
    if params.min_exit < bounds.min_exit and (params.exits is None or min(params.exits, default=1) < bounds.min_exit):
        yield "min_exit", _below(params.min_exit, bounds, "min_exit")


def _sled_problems(bounds: "BoundsConfig", params: "ExitParams") -> Problems:
    if params.sled.steps > bounds.sled_steps:
        yield "sled.steps", _above(params.sled.steps, bounds, "sled_steps")
    if params.sled.top_k > bounds.sled_top_k:
        yield "sled.top_k", _above(params.sled.top_k, bounds, "sled_top_k")
    if params.sled.alpha > _LARGEST_ALPHA:
        yield "sled.alpha", _outside(params.sled.alpha, 0, _LARGEST_ALPHA)
    yield from _logit_problems("sled.lower_bound", params.sled.lower_bound)


def _logit_problems(field: str, logit: float) -> Problems:
    if abs(logit) > _LARGEST_LOGIT:
        yield field, _outside(logit, -_LARGEST_LOGIT, _LARGEST_LOGIT)


def _among(field: str, value: str, bounds: "BoundsConfig", bound: str) -> Problems:
    allowed: Collection[str] | None = getattr(bounds, bound)
    if allowed is not None and value not in allowed:
        yield field, f"{value!r} is not among serving.bounds.{bound} = [{', '.join(allowed)}]"


def _above(value: float, bounds: "BoundsConfig", bound: str) -> str:
    return f"{value} is above serving.bounds.{bound} = {getattr(bounds, bound)}"


def _below(value: float, bounds: "BoundsConfig", bound: str) -> str:
    return f"{value} is below serving.bounds.{bound} = {getattr(bounds, bound)}"


def _outside(value: float, least: float, most: float) -> str:
    return f"{value:g} is not between {least:g} and {most:g}"
