"""What clients may send. A field that is not here is refused by name: nobody is to believe that it did something."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_Finite = Field(allow_inf_nan=False)
Number = Annotated[float, _Finite]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | TokenIds
Text = Annotated[str, Field(min_length=1)]


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Fields(BaseModel):
    """Strict: "5" is no number, and neither is true."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Fields):
    include_usage: bool | None = None


class GenerationRequest(_Fields):
    """What both kinds of requests have. Null stands for a field that is not there, and then the server's own settings
    hold.

    Beyond OpenAI's interface: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids` and `ignore_eos`
    as in `inference.sampling`; and `early_exit`, of the fields of `inference.exit`.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Text], BeforeValidator(_one_as_list)] | None = None
    seed: int | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Number] | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    early_exit: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with how many tokens there were."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """Of `POST /v1/completions`.

    Attributes:
        prompt: one or several, texts or tokens.
        logprobs: how many of the likeliest tokens are told with each.
        echo: the prompt comes before its answer, and with its log-probabilities, if these are asked for.
        best_of, suffix: None, or what changes nothing.
    """

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ChatCompletionRequest(GenerationRequest):
    """Of `POST /v1/chat/completions`.

    Attributes:
        max_completion_tokens: a newer name of max_tokens.
        logprobs: whether log-probabilities are told, `top_logprobs` of the likeliest tokens with each.
        response_format, store, parallel_tool_calls, tools, tool_choice: None, or what changes nothing.
    """

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
