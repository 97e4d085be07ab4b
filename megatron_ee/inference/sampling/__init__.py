"""From logits to a token, as a request says. Rows of a batch are drawn together, and none depends on another.

The steps, in the order of vLLM, which is that of transformers but for min-p, there last:
1. logit_bias, then repetition_penalty (tokens of prompt and answer), frequency_penalty and presence_penalty (answer),
   then no stop token before min_new_tokens;
2. temperature 0: the likeliest token, of equals the lowest id. Otherwise the logits are divided by it;
3. min_p, top_k, top_p, each of what the one before has left; tokens that are equal at a border stay together;
4. a draw by the inverse of the cumulative distribution, with one random number of the request's own.
Log-probabilities are those of the logits before any step.
"""

from megatron_ee.inference.sampling.check import check_sampling
from megatron_ee.inference.sampling.choose import Choice, choose
from megatron_ee.inference.sampling.distribution import probabilities
from megatron_ee.inference.sampling.draw import NO_TOKEN, NoTokenError, draw
from megatron_ee.inference.sampling.draws import Draws, Row
from megatron_ee.inference.sampling.logprobs import logprobs_of
from megatron_ee.inference.sampling.propose import propose
from megatron_ee.inference.sampling.verify import Drafted, verify

__all__ = [
    "NO_TOKEN",
    "Choice",
    "Drafted",
    "Draws",
    "NoTokenError",
    "Row",
    "check_sampling",
    "choose",
    "draw",
    "logprobs_of",
    "probabilities",
    "propose",
    "verify",
]
