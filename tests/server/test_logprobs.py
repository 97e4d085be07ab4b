"""Log-probabilities as JSON."""

import json
import math

from megatron_ee.inference.request import Logprobs
from megatron_ee.server.protocol.logprobs import ChatLogprobs, CompletionLogprobs, Told
from megatron_ee.tokenizer.byte import ByteTokenizer

_TOKENIZER = ByteTokenizer()


def test_what_cannot_be_is_still_a_number() -> None:
    told = [Told(97, "a", Logprobs(-math.inf, {98: 0.0, 99: -math.inf}), 0)]
    for style in (CompletionLogprobs(_TOKENIZER), ChatLogprobs(_TOKENIZER)):
        assert "-9999.0" in json.dumps(style.body(told), allow_nan=False)


def test_of_tokens_that_are_written_alike_the_likelier_one_is_told() -> None:
    told = [Told(201, "\ufffd", Logprobs(-2.0, {200: -0.1, 201: -2.0, 97: -3.0}), 0)]
    (top,) = CompletionLogprobs(_TOKENIZER).body(told)["top_logprobs"]
    assert top == {"\ufffd": -0.1, "a": -3.0}


def test_the_token_itself_is_told_beside_the_likeliest() -> None:
    told = [Told(97, "a", Logprobs(-5.0, {98: -0.1}), 0), Told(98, "b", None, 1)]
    body = CompletionLogprobs(_TOKENIZER).body(told)
    assert body["top_logprobs"] == [{"b": -0.1, "a": -5.0}, None]
    assert (body["token_logprobs"], body["text_offset"]) == ([-5.0, None], [0, 1])
