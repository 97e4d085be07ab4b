"""The official client, unchanged, against a real server; what it gets is what the model says from Python."""

import asyncio
from pathlib import Path

import openai
import pytest
from helpers.loops import run
from helpers.servers import RunningServer

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.llm import LLM


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, device="cpu")


def test_a_completion_is_what_the_model_says(client: openai.OpenAI, llm: LLM) -> None:
    (said,) = llm.generate("some text", SamplingParams(max_new_tokens=12), ExitParams(threshold=0.016))
    answer = client.completions.create(model="tiny", prompt="some text", max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (said.text, said.finish_reason)
    depths = choice.model_extra["early_exit"]  # type: ignore[index]
    assert depths["exit_layers"] == said.exit_layers
    assert len(set(said.exit_layers)) > 1, "all tokens left at the same layer: this shows little"
    assert depths["confidences"] == pytest.approx(said.confidences)
    assert depths["mean_depth"] == pytest.approx(said.mean_depth)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)
    assert answer.model == "tiny"


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "some text", "max_tokens": 24, "temperature": 0.8, "seed": 3}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *texts, usage = pieces
    assert "".join(piece.choices[0].text for piece in texts) == whole.choices[0].text
    tokens = [token for piece in texts for token in piece.choices[0].model_extra["early_exit"]["tokens"]]
    assert [token["exit_layer"] for token in tokens] == whole.choices[0].model_extra["early_exit"]["exit_layers"]
    for piece in texts:
        told = piece.choices[0].model_extra["early_exit"]["tokens"]
        assert "".join(token["text"] for token in told) == piece.choices[0].text
    assert texts[-1].choices[0].finish_reason == "length"
    assert texts[-1].choices[0].model_extra["early_exit"]["mean_depth"] == pytest.approx(
        whole.choices[0].model_extra["early_exit"]["mean_depth"]
    )
    assert usage.usage == whole.usage
    assert all(piece.usage is None for piece in texts)


def test_several_prompts_and_several_answers_to_each(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 1.0, "seed": 7}
    together = client.completions.create(prompt=["a b", [99, 32, 100]], n=2, **asked)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in ("a b", "c d")]
    assert [together.choices[0].text, together.choices[2].text] == alone
    assert together.choices[0].text != together.choices[1].text
    assert together.usage is not None and together.usage.prompt_tokens == 6


def test_without_a_seed_nobody_gets_the_same_text_twice(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 16, "temperature": 1.0}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) == 3


def test_stop_strings_are_no_part_of_the_text(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "some text", "max_tokens": 24, "temperature": 0.8, "seed": 3}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:8]
    (choice,) = client.completions.create(**asked, stop=[stop]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_echo_and_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(
        model="tiny", prompt="some text", max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    (choice,) = answer.choices
    assert choice.text.startswith("some text")
    told = choice.logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None
    assert "".join(told.tokens[:9]) == "some text"
    assert told.token_logprobs[0] is None
    (scores,) = llm.score(["some text"], top=3)
    assert told.token_logprobs[1:9] == pytest.approx([of.token for of in scores])
    assert told.text_offset[:10] == list(range(10))
    assert all(1 <= len(top) <= 4 for top in told.top_logprobs[1:9])  # bytes that are no text look alike


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="text", max_tokens=0, logprobs=0, echo=True)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("text", "length")
    assert choice.logprobs is not None and len(choice.logprobs.token_logprobs or ()) == 4
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_a_conversation(client: openai.OpenAI, llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    prompt = "system:\nBe brief.<|endoftext|>user:\nhi<|endoftext|>assistant:\n"
    tokens = [256 if part is None else byte for part in _parts(prompt) for byte in (part or [256])]
    (said,) = llm.generate([tokens], SamplingParams(max_new_tokens=8), ExitParams(threshold=0.016))
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", said.text)
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 8
    assert all(len(of.top_logprobs) == 2 for of in choice.logprobs.content)


def _parts(prompt: str) -> list[list[int] | None]:
    """Bytes, and None for each end of a document."""
    first, *others = prompt.split("<|endoftext|>")
    return [list(first.encode()), *(part for other in others for part in (None, list(other.encode())))]


def test_a_streamed_conversation(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason is not None


def test_what_a_request_says_of_exits(client: openai.OpenAI) -> None:
    def depths(**exit: object) -> list[int]:
        asked = {"model": "tiny", "prompt": "some text", "max_tokens": 12, "temperature": 0}
        answer = client.completions.create(**asked, extra_body={"early_exit": exit})
        return answer.choices[0].model_extra["early_exit"]["exit_layers"]  # type: ignore[index]

    assert set(depths(mode="full")) == {8}
    assert set(depths(threshold=0.0)) == {2}
    assert set(depths(threshold=0.0, min_exit=3)) == {5}
    assert set(depths(thresholds={"2": 1, "5": 0.0})) == {5}
    assert set(depths(threshold=1)) == {8}


def test_drafts_are_told(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "some text", "max_tokens": 24, "temperature": 0}
    full = client.completions.create(**asked, extra_body={"early_exit": {"mode": "full"}})
    drafting = {"mode": "speculative", "draft_exit": 5, "draft_length": 3}
    answer = client.completions.create(**asked, extra_body={"early_exit": drafting})
    assert answer.choices[0].text == full.choices[0].text
    depths = answer.choices[0].model_extra["early_exit"]  # type: ignore[index]
    assert 0 < depths["acceptance"] <= 1
    details = answer.usage.completion_tokens_details  # type: ignore[union-attr]
    assert details.accepted_prediction_tokens == sum(of == 5 for of in depths["draft_exits"])


def test_the_model_is_listed_with_its_exits(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.early_exit["exits"] == [2, 5]  # type: ignore[attr-defined]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_stream_that_is_closed_leaves_nothing(server: RunningServer, client: openai.OpenAI) -> None:
    before = server.metric("request_outcomes_total", outcome="cancelled")
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=512, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_until_idle()
    assert server.metric("request_outcomes_total", outcome="cancelled") == before + 1
    assert server.metric("generation_tokens_total") < 10_000


def test_an_answer_that_nobody_waits_for_is_given_up(server: RunningServer) -> None:
    before = server.metric("request_outcomes_total", outcome="cancelled")

    async def ask() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asking = asyncio.create_task(
            client.completions.create(model="tiny", prompt="x", max_tokens=512, extra_body={"ignore_eos": True})
        )
        await asyncio.sleep(0.3)
        asking.cancel()
        await client.close()

    run(ask())
    server.wait_until_idle()
    assert server.metric("request_outcomes_total", outcome="cancelled") == before + 1


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature" and "temperature" in wrong.value.message
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="tiny", prompt="x", extra_body={"early_exit": {"treshold": 0.5}})
    assert unknown.value.param == "early_exit.treshold" and "'threshold'" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as bound:
        client.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert (bound.value.code, bound.value.param) == ("out_of_bounds", "max_tokens")
    with pytest.raises(openai.NotFoundError) as other:
        client.completions.create(model="gpt-4", prompt="x")
    assert other.value.code == "model_not_found"
