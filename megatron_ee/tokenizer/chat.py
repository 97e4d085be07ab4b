"""Chat templates: conversations to tokens, for training and for prompts.

A template is a Jinja program of a stranger: it runs in Jinja's sandbox, and can neither change what it is given nor
reach anything else. The special tokens that it writes become tokens; what a message spells out stays text.

What lies between special tokens is encoded piece by piece, and a piece ends where an answer begins or ends. A tokenizer
would join letters over these borders; but when the model answers, its prompt is encoded alone and its own tokens begin
at the border, so they have to do so in training too.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ee.errors import FieldError
from megatron_ee.tokenizer import Tokenizer
from megatron_ee.tokenizer.disguise import BEGIN, END, Disguise, SpecialSpellings
from megatron_ee.tokenizer.huggingface import CHAT_TEMPLATE_FILE
from megatron_ee.tokenizer.messages import ChatError, Message, has_answer

__all__ = ["CHAT_TEMPLATE_FILE", "DEFAULT", "ChatTemplate", "ChatTokens", "open_chat_template", "template_files"]

DEFAULT = "default"

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = re.compile(f"[{BEGIN}{END}]")


class ChatTokens(NamedTuple):
    """A conversation; `learned` says of each token whether it is part of an answer, or ends one."""

    tokens: list[int]
    learned: list[bool]


class _Rendered(NamedTuple):
    """A conversation as text, still disguised, and where in it the answers are: (start, stop), ascending."""

    text: str
    answers: list[tuple[int, int]]
    disguise: Disguise


class ChatTemplate:
    """How a model's conversations are written. The same template renders what is learned and what is asked.

    An answer is what a `{% generation %}` block holds, if the template has such blocks. If not, it is what a message
    of the assistant adds to the prompt for it, up to the last special token there (<|im_end|>, the end of document);
    all of it where there is none. A special token just after a block ends the answer, too, and is learned with it.

    Attributes:
        source: the Jinja program; `strftime_now` is not defined, so that the same conversation is always the same.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ChatError: it is no template.
        """
        self.source = source
        self._tokenizer = tokenizer
        self._spellings = SpecialSpellings(tokenizer.special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ChatError(f"line {error.lineno}: {error.message}") from error
        self._has_blocks = _GENERATION.search(source) is not None

    @property
    def digest(self) -> str:
        """Of all that decides on a conversation's tokens, beside the tokenizer's own file."""
        tokenizer = self._tokenizer
        settings = [self.source, sorted(tokenizer.special_tokens.items()), sorted(tokenizer.named_tokens.items())]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text that a template writes, to read; only `encode` and `prompt` tell its special tokens from others.

        Raises:
            ChatError: the template refuses the conversation, or fails.
        """
        disguise = self._disguise(messages)
        return disguise.take_off(_MARK.sub("", self._run(messages, disguise, add_generation_prompt)))

    def encode(self, messages: Sequence[Message]) -> ChatTokens:
        """The tokens of a whole conversation.

        Raises:
            ChatError: the template refuses the conversation, or does not show where its answers are.
        """
        return self._tokenize(self._locate(messages, add_generation_prompt=False))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens after which the model answers: those that come before the answer in `encode`.

        Raises:
            ChatError: see `encode`.
        """
        return self._tokenize(self._locate(messages, add_generation_prompt=True)).tokens

    def _locate(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> _Rendered:
        disguise = self._disguise(messages)
        if self._has_blocks:
            marked = self._run(messages, disguise, add_generation_prompt)
            answers = list(self._blocks(marked))
            if not answers and has_answer(messages):
                raise ChatError("the chat template writes no {% generation %} block for this conversation")
            return _Rendered(_MARK.sub("", marked), answers, disguise)
        text, answers = "", []
        for number, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._continue(text, messages[:number], disguise, add_generation_prompt=True)
                text = self._continue(prompt, messages[: number + 1], disguise, add_generation_prompt=False)
                answers.append((len(prompt), self._end_of_answer(prompt, text, number, message, disguise)))
        whole = self._continue(text, messages, disguise, add_generation_prompt=add_generation_prompt)
        return _Rendered(whole, answers, disguise)

    def _continue(
        self, before: str, messages: Sequence[Message], disguise: Disguise, *, add_generation_prompt: bool
    ) -> str:
        text = self._run(messages, disguise, add_generation_prompt)
        if not text.startswith(before):
            same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))
            raise ChatError(
                f"the chat template changes what it wrote before message {len(messages) - 1}: "
                f"{disguise.take_off(before[same : same + 20])!r} becomes "
                f"{disguise.take_off(text[same : same + 20])!r}; it needs {{% generation %}} blocks"
            )
        return text

    def _end_of_answer(self, prompt: str, text: str, number: int, message: Message, disguise: Disguise) -> int:
        if disguise.put_on(message.content).strip() not in text[len(prompt) :]:
            raise ChatError(
                f"messages.{number}: the chat template does not write the answer as it is, behind the prompt for it"
            )
        specials = list(self._spellings.pattern.finditer(text, len(prompt)))
        return specials[-1].end() if specials else len(text)

    def _blocks(self, marked: str) -> Iterator[tuple[int, int]]:
        """Where the blocks are in the text without marks."""
        text, start, removed = _MARK.sub("", marked), None, 0
        for mark in _MARK.finditer(marked):
            at, removed = mark.start() - removed, removed + 1
            if (mark[0] == BEGIN) != (start is None):
                raise ChatError("the chat template has a {% generation %} block within another")
            if start is None:
                start = at
                continue
            ends = [match.end() for match in self._spellings.pattern.finditer(text, start, at)]
            following = self._spellings.pattern.match(text, at)
            is_open = not ends or text[ends[-1] : at].strip()
            yield start, following.end() if following and is_open else at
            start = None

    def _tokenize(self, rendered: _Rendered) -> ChatTokens:
        text, answers, disguise = rendered
        tokens: list[int] = []
        learned: list[bool] = []
        borders = sorted({border for answer in answers for border in answer})

        def is_answer(place: int) -> bool:
            return any(start <= place < stop for start, stop in answers)

        for piece, special in self._pieces(text, borders):
            if special is not None:
                ids = [special]
            else:
                part = disguise.take_off(text[piece])
                ids = self._tokenizer.encode_within(part) if piece.start else self._tokenizer.encode(part)
            tokens += ids
            learned += [is_answer(piece.start)] * len(ids)
        return ChatTokens(tokens, learned)

    def _pieces(self, text: str, borders: Sequence[int]) -> Iterator[tuple[slice, int | None]]:
        """Parts of the text in order, each with the special token that it is, if it is one."""
        start, strips = 0, False
        for match in [*self._spellings.pattern.finditer(text), None]:
            special = self._tokenizer.special_tokens[match[0]] if match else None
            stop = match.start() if match else len(text)
            if strips:
                start = stop - len(text[start:stop].lstrip())
            end = start + len(text[start:stop].rstrip()) if special and special.strips_left else stop
            cuts = [start, *(border for border in borders if start < border < end), end]
            yield from ((slice(a, b), None) for a, b in pairwise(cuts) if a < b)
            if match and special:
                yield slice(*match.span()), special.id
                start, strips = match.end(), special.strips_right

    def _run(self, messages: Sequence[Message], disguise: Disguise, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[{"role": role, "content": disguise.put_on(content)} for role, content in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokenizer.named_tokens,
            )
        except Exception as error:  # a template may fail in any way that a program can
            said = error.message if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise ChatError(f"the chat template fails: {said}") from error

    def _disguise(self, messages: Sequence[Message]) -> Disguise:
        return Disguise(self._spellings, [self.source, *(message.content for message in messages)])


def open_chat_template(name: str, tokenizer: Tokenizer, *, field: str = "data.chat_template") -> ChatTemplate:
    """The template that a config names: `default`, which is the tokenizer's own, or a file.

    Raises:
        FieldError: the tokenizer has none, or the file cannot be read or is no template.
    """
    source = tokenizer.chat_template
    if name != DEFAULT:
        try:
            source = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FieldError(field, f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if source is None:
        raise FieldError(field, "the tokenizer has no chat template of its own: name a Jinja file")
    try:
        return ChatTemplate(source, tokenizer)
    except ChatError as error:
        raise FieldError(field, f"{'of the tokenizer' if name == DEFAULT else name}: {error}") from error


def template_files(name: str, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a checkpoint keeps of the template that a config names, so that a folder with it and the tokenizer's files
    says how its conversations are written. Of the tokenizer's own, nothing.

    Raises:
        FieldError: see `open_chat_template`.
    """
    return {} if name == DEFAULT else {CHAT_TEMPLATE_FILE: open_chat_template(name, tokenizer).source.encode()}


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` is what the model is to write."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """With what templates written for Hugging Face's libraries rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
