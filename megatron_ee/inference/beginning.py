"""From a request to a sequence that has yet to run: all that can be wrong with it is said here."""

from megatron_ee.errors import FieldError
from megatron_ee.inference.corrections import check_shared_vocabulary
from megatron_ee.inference.exit_rule import ExitRule
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Logprobs, Request
from megatron_ee.inference.sampling import Draws, check_sampling
from megatron_ee.inference.sequences import DecodingSequence
from megatron_ee.inference.speculation.pace import MOST_DRAFTED, Pace


def begin(model: OpenedModel, request: Request, *, capacity: int, max_pending: int) -> DecodingSequence:
    """
    Args:
        capacity: longest sequence, prompt and answer, in positions.
        max_pending: the largest that it may name.

    Raises:
        FieldError: it names an exit or a token that the model doesn't have, or asks a gate or a measure that isn't
            there; or prompt and answer are longer than the model's positions or the capacity.
    """
    rule = ExitRule(request.exit, model.exits, model.gated)
    model.measure_named(rule.measure)
    check_shared_vocabulary(model.facts, request.exit.mode, rule.heard)
    check_sampling(request.sampling, model.tokenizer.vocab_size)
    if rule.max_pending > max_pending:
        raise FieldError("inference.exit.max_pending", f"{rule.max_pending} is above the batch's {max_pending}")
    limit = _limit(model, request)
    if len(request.prompt) + limit - 1 > capacity:
        message = f"{len(request.prompt)} + {limit} new tokens do not fit into {capacity} positions"
        raise FieldError("prompt", message)
    stops, pace = rule.stops_at(model.exits), _pace_of(model, request, rule)
    scores: list[Logprobs] | None = None if request.prompt_logprobs is None else []
    return DecodingSequence(request, rule, Draws(request), stops, limit, list(request.prompt), pace, scores=scores)


def _limit(model: OpenedModel, request: Request) -> int:
    """Most new tokens."""
    limit, length = request.sampling.max_new_tokens, len(request.prompt)
    if model.max_positions is None:
        return limit
    if length > model.max_positions:
        raise FieldError("prompt", f"{length} tokens, but the model has {model.max_positions} positions")
    return min(limit, model.max_positions - length + 1)


def _pace_of(model: OpenedModel, request: Request, rule: ExitRule) -> Pace | None:
    if not rule.drafts:
        return None
    length = request.exit.draft_length
    costs = {layer: model.draft_costs[layer] for layer in rule.drafts}
    return Pace(costs, None if length == "auto" else length, most=min(MOST_DRAFTED, rule.max_pending))
