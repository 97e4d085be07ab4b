"""Refuses requests that ask for more than a server gives. Nothing is made smaller in silence."""

from megatron_ee.config import BoundsConfig, ExitParams, InferenceConfig, SamplingParams
from megatron_ee.config.checks_serving import exit_bound_problems, own_problems, sampling_bound_problems
from megatron_ee.errors import FieldError


class OutOfBoundsError(FieldError):
    """A request that asks for more than `serving.bounds` allows; the field is named as in a config."""


def check_bounds(
    bounds: BoundsConfig, *, sampling: SamplingParams, exit: ExitParams, num_prompt: int, choices: int
) -> None:
    """
    Args:
        sampling, exit: as the request is to be served: what it says, laid over the server's own settings.
        num_prompt: tokens of its longest prompt.
        choices: answers: prompts times n.

    Raises:
        OutOfBoundsError: for the first problem.
    """
    if bounds.prompt_tokens is not None and num_prompt > bounds.prompt_tokens:
        message = f"{num_prompt} tokens are above serving.bounds.prompt_tokens = {bounds.prompt_tokens}"
        raise OutOfBoundsError("prompt", message)
    if choices > bounds.choices:
        raise OutOfBoundsError("n", f"{choices} answers are above serving.bounds.choices = {bounds.choices}")
    for field, message in (*exit_bound_problems(bounds, exit), *sampling_bound_problems(bounds, sampling)):
        raise OutOfBoundsError(field, message)


def check_own_settings(bounds: BoundsConfig, inference: InferenceConfig) -> None:
    """
    Raises:
        FieldError: requests that say nothing would be out of bounds.
    """
    for field, message in own_problems(bounds, inference):
        raise FieldError(field, message)
