"""What a request may ask for: each bound, what is never refused, and what costs the same whatever its value."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import BoundsConfig, ExitParams, InferenceConfig, SamplingParams, SledParams
from megatron_ee.errors import FieldError
from megatron_ee.inference.corrections.sled import sled
from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling import Draws
from megatron_ee.inference.sampling.choose import choose
from megatron_ee.server.guard.bounds import OutOfBoundsError, check_bounds, check_own_settings


def check(
    bounds: dict[str, Any] | None = None,
    *,
    exit: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    num_prompt: int = 5,
    choices: int = 1,
) -> None:
    check_bounds(
        BoundsConfig.model_validate(bounds or {}),
        sampling=SamplingParams.model_validate(sampling or {}),
        exit=ExitParams.model_validate(exit or {}),
        num_prompt=num_prompt,
        choices=choices,
    )


EXIT = [
    ({"modes": ["early_exit"]}, {"mode": "sled"}, "mode", "'sled' is not among serving.bounds.modes = [early_exit]"),
    ({"kv_policies": ["fill"]}, {}, "kv_policy", "'recompute' is not among serving.bounds.kv_policies = [fill]"),
    ({"measures": ["gate"]}, {}, "measure", "'max_probability' is not among serving.bounds.measures = [gate]"),
    ({"threshold": 0.8}, {"threshold": 0.79}, "threshold", "0.79 is below serving.bounds.threshold = 0.8"),
    ({"threshold": 0.8}, {"thresholds": {3: 0.9, 6: 0.5}}, "thresholds.6", "0.5 is below serving.bounds.threshold"),
    ({"min_exit": 4}, {"min_exit": 3}, "min_exit", "3 is below serving.bounds.min_exit = 4"),
    ({"min_exit": 4}, {"exits": [3, 6]}, "min_exit", "0 is below serving.bounds.min_exit = 4"),
    ({}, {"max_pending": 15}, "max_pending", "15 is below serving.bounds.max_pending = 16"),
    ({}, {"exits": [3, 3]}, "exits", "names an exit twice"),
    ({}, {"sled": {"layers": [3, 6, 3]}}, "sled.layers", "names an exit twice"),
    ({}, {"dola": {"layers": [3, 3]}}, "dola.layers", "names an exit twice"),
    ({}, {"mode": "full", "exits": [3] * 9}, "exits", "names an exit twice"),
    (
        {"draft_length": 4},
        {"mode": "speculative", "draft_length": 5},
        "draft_length",
        "5 is above serving.bounds.draft_length = 4",
    ),
    ({}, {"mode": "sled", "sled": {"steps": 10**9}}, "sled.steps", "1000000000 is above serving.bounds.sled_steps = 8"),
    ({}, {"mode": "sled", "sled": {"top_k": 65}}, "sled.top_k", "65 is above serving.bounds.sled_top_k = 64"),
    ({}, {"mode": "sled", "sled": {"alpha": 1e300}}, "sled.alpha", "1e+300 is not between 0 and 100"),
    ({}, {"mode": "sled", "sled": {"lower_bound": 1e300}}, "sled.lower_bound", "1e+300 is not between -1e+30 and"),
    ({}, {"mode": "dola", "dola": {"lower_bound": -1e300}}, "dola.lower_bound", "-1e+300 is not between"),
]  # fmt: skip


@pytest.mark.parametrize(("bounds", "exit", "field", "message"), EXIT)
def test_exits_have_bounds(bounds: dict[str, Any], exit: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(OutOfBoundsError) as error:
        check(bounds, exit=exit)
    assert error.value.field == f"inference.exit.{field}"
    assert message in error.value.message


SAMPLING = [
    ({"new_tokens": 100}, {}, "max_new_tokens", "128 is above serving.bounds.new_tokens = 100"),
    ({"logprobs": 2}, {"logprobs": 3}, "logprobs", "3 is above serving.bounds.logprobs = 2"),
    ({"stops": 2}, {"stop": ["a", "b", "c"]}, "stop", "3 is above serving.bounds.stops = 2"),
    ({"stops": 2}, {"stop_token_ids": [1, 2, 3]}, "stop_token_ids", "3 is above serving.bounds.stops = 2"),
    ({}, {"stop": ["a" * 257]}, "stop", "257 is above serving.bounds.stop_characters = 256"),
    ({"biases": 1}, {"logit_bias": {1: 1.0, 2: 1.0}}, "logit_bias", "2 is above serving.bounds.biases = 1"),
    ({}, {"logit_bias": {7: -1e308}}, "logit_bias.7", "-1e+308 is not between -100 and 100"),
    ({}, {"temperature": 1e300}, "temperature", "1e+300 is not between 0 and 100"),
    ({}, {"repetition_penalty": 1e-300}, "repetition_penalty", "1e-300 is not between 0.01 and 100"),
    ({}, {"repetition_penalty": 101.0}, "repetition_penalty", "101 is not between 0.01 and 100"),
]


@pytest.mark.parametrize(("bounds", "sampling", "field", "message"), SAMPLING)
def test_sampling_has_bounds(bounds: dict[str, Any], sampling: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(OutOfBoundsError) as error:
        check(bounds, sampling=sampling)
    assert error.value.field == f"inference.sampling.{field}"
    assert message in error.value.message


def test_prompts_and_answers_have_bounds() -> None:
    with pytest.raises(OutOfBoundsError, match=r"prompt: 6 tokens are above serving.bounds.prompt_tokens = 5"):
        check({"prompt_tokens": 5}, num_prompt=6)
    with pytest.raises(OutOfBoundsError, match=r"n: 17 answers are above serving.bounds.choices = 16"):
        check(choices=17)
    check({"prompt_tokens": 5}, num_prompt=5, choices=16)


NARROW: dict[str, Any] = {
    "modes": [],
    "kv_policies": ["fill"],
    "measures": ["gate"],
    "threshold": 1.0,
    "min_exit": 99,
    "max_pending": 1000,
    "draft_length": 1,
    "sled_steps": 1,
    "sled_top_k": 1,
}


def test_full_depth_is_always_allowed() -> None:
    check(NARROW, exit={"mode": "full"})
    check(NARROW, exit={"mode": "full", "threshold": 0.0, "max_pending": 1, "sled": {"steps": 9, "alpha": 1e9}})
    disguised = {"threshold": 1.0, "thresholds": {3: 1}}
    check({"threshold": 1.0, "measures": ["max_probability"]}, exit=disguised)


def test_what_lies_on_a_bound_is_allowed() -> None:
    check({"threshold": 0.8, "measures": ["max_probability"]}, exit={"threshold": 0.8, "thresholds": {3: 0.8}})
    check({"min_exit": 4}, exit={"min_exit": 4})
    check({"min_exit": 4}, exit={"exits": [4, 6]})
    check({"draft_length": 4}, exit={"mode": "speculative", "draft_length": 4})
    check({"draft_length": 1}, exit={"mode": "speculative"})  # the server itself chooses
    check({"stops": 1, "stop_characters": 2}, sampling={"stop": ["ab"], "stop_token_ids": [1]})
    check(exit={"mode": "sled", "sled": {"steps": 8, "top_k": 64, "alpha": 100.0, "lower_bound": -1e30}})
    check(sampling={"logit_bias": dict.fromkeys(range(1024), -100.0), "temperature": 100.0, "logprobs": 20})


def test_bounds_of_other_modes_are_not_asked() -> None:
    check(NARROW | {"modes": ["speculative"], "kv_policies": None, "max_pending": 1}, exit={"mode": "speculative"})
    check({"threshold": 0.8, "min_exit": 9, "kv_policies": []}, exit={"mode": "sled", "threshold": 0.1})


@given(
    exit=st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.floats(0, 1),
            "min_exit": st.one_of(st.integers(0, 20), st.just(2**70)),
            "patience": st.sampled_from([1, 3, 2**70]),
            "draft_threshold": st.floats(0, 1),
            "thresholds": st.dictionaries(st.integers(1, 12), st.floats(0, 1)),
        },
    )
)
def test_no_early_token_is_below_a_bound(exit: dict[str, Any]) -> None:
    """Whatever passes, each exit that may fire needs at least the bound, and lies at least as deep."""
    exits = (2, 4, 6, 8)
    bounds = {"threshold": 0.7, "min_exit": 4, "measures": ["max_probability"]}
    try:
        check(bounds, exit=exit)
    except OutOfBoundsError:
        return
    may_fire = ExitParams.model_validate(exit).may_fire(exits)
    assert all(layer >= 4 and threshold >= 0.7 for layer, threshold in may_fire.items())


def test_the_servers_own_settings_are_checked_in_every_mode_that_may_be_asked_for() -> None:
    def own(bounds: dict[str, Any], **sections: Any) -> None:
        check_own_settings(BoundsConfig.model_validate(bounds), InferenceConfig.model_validate(sections))

    own({})
    with pytest.raises(FieldError, match=r"inference.exit.sled.steps: 99 is above"):
        own({}, exit={"sled": {"steps": 99}})
    own({"modes": ["early_exit", "speculative"]}, exit={"sled": {"steps": 99}})
    with pytest.raises(FieldError, match=r"inference.exit.threshold: 0.5 is below"):
        own({"threshold": 0.6}, exit={"mode": "full", "threshold": 0.5})
    with pytest.raises(FieldError, match=r"inference.exit.mode: 'sled' is not among"):
        own({"modes": ["early_exit"]}, exit={"mode": "sled"})
    with pytest.raises(FieldError, match=r"inference.sampling.max_new_tokens: 2000 is above"):
        own({}, sampling={"max_new_tokens": 2000})


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {0: 100.0, 1: -100.0}, "repetition_penalty": 100.0},
        {"repetition_penalty": 0.01, "frequency_penalty": 2.0, "presence_penalty": -2.0},
        {"temperature": 100.0, "min_new_tokens": 5, "stop_token_ids": [3]},
        {"temperature": 1e-300, "top_k": 2**70, "top_p": 1e-300, "min_p": 1.0},
    ],
)
def test_a_token_can_be_chosen_wherever_sampling_is_within_its_bounds(sampling: dict[str, Any]) -> None:
    check(sampling=sampling)
    draws = Draws(Request((0, 1, 2), SamplingParams.model_validate(sampling)))
    draws.answer += [4, 5]
    logits_NV = torch.linspace(-1e4, 1e4, 8)[None]
    assert choose(logits_NV, [draws]) != [None]


@pytest.mark.parametrize(
    "params", [{"alpha": 100.0, "steps": 8, "top_k": 64}, {"lower_bound": 1e30}, {"lower_bound": -1e30}]
)
def test_corrected_logits_are_numbers_wherever_sled_is_within_its_bounds(params: dict[str, Any]) -> None:
    check(exit={"mode": "sled", "sled": params})
    final_NV = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)) * 50
    evolved_NV = sled(final_NV, [final_NV.flip(-1), final_NV / 2], SledParams.model_validate(params))
    assert evolved_NV.isfinite().all()
