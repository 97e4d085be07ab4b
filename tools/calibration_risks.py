"""What an answer that exits gave loses, in [0, 1]."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megatron_ee.inference.completion import Completion
from megatron_ee.inference.opened import OpenedModel
from megatron_ee.inference.request import Request
from megatron_ee.inference.sampling.choose import choose
from megatron_ee.inference.sampling.draws import Draws


def disagreement(model: OpenedModel, request: Request, text: Completion) -> float:
    """The share of its tokens that full depth would not have drawn, given the same text before them and the same random
    numbers; 0 for a text of full depth."""
    drawn = full_depth_draws(model, request, text)
    return sum(token != of_full for token, of_full in zip(text.tokens, drawn, strict=True)) / len(text.tokens)


def difference(text: Completion, of_full: Completion) -> float:
    """1 - ROUGE-L of the tokens: how far it is from the text that full depth writes of itself (textual consistency,
    arXiv 2207.07061)."""
    if text.tokens == of_full.tokens:
        return 0.0
    common = longest_common_subsequence(text.tokens, of_full.tokens)
    return 1 - 2 * common / (len(text.tokens) + len(of_full.tokens))


def mismatch(text: str, reference: str) -> float:
    """0 if it is the reference, but for spaces around it; or 1."""
    return float(text.strip() != reference.strip())


def words_lost(text: str, reference: str) -> float:
    """1 - F1 of the words, whatever their order and case."""
    words, wanted = (Counter(of.lower().split()) for of in (text, reference))
    common = (words & wanted).total()
    return 1 - 2 * common / (words.total() + wanted.total()) if words or wanted else 0.0


AGAINST_REFERENCES: Mapping[str, Callable[[str, str], float]] = {"exact_match": mismatch, "words": words_lost}
AGAINST_FULL_DEPTH = ("disagreement", "difference")
RISKS = (*AGAINST_FULL_DEPTH, *AGAINST_REFERENCES)


def full_depth_draws(model: OpenedModel, request: Request, text: Completion) -> list[int]:
    """The token that full depth would have drawn in the place of each, given all before it."""
    logits_SV = model.full_depth_logits([*text.prompt, *text.tokens][:-1])[len(text.prompt) - 1 :]
    draws = Draws(request)
    if draws.is_plain:
        return logits_SV.argmax(-1).tolist()
    drawn = []
    for logits_V, token in zip(logits_SV, text.tokens, strict=True):
        (choice,) = choose(logits_V[None], [draws])
        assert choice is not None, "the text has been written, so its logits are numbers"
        drawn.append(choice.token)
        draws.answer.append(token)
    return drawn


def longest_common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Its length."""
    lengths = [0] * (len(b) + 1)
    for item in a:
        diagonal = 0
        for at, other in enumerate(b, start=1):
            above = lengths[at]
            lengths[at] = diagonal + 1 if item == other else max(above, lengths[at - 1])
            diagonal = above
    return lengths[-1]
