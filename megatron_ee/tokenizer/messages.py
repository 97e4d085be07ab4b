"""Conversations as they lie in files and requests: lists of {"role", "content"}."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_ee.errors import UserError, did_you_mean

ROLES = ("system", "user", "assistant")


class ChatError(UserError):
    """Something that is no conversation, or that a chat template cannot write."""


class Message(NamedTuple):
    role: str
    content: str


def parse_messages(value: object) -> list[Message]:
    """The messages of a JSON list.

    Raises:
        ChatError: no list, or an empty one; a message with another role, with keys beside role and content, with
            content that is no text, or with an empty answer.
    """
    if not isinstance(value, list) or not value:
        raise ChatError(f"messages: {'empty' if value == [] else 'no list'}: it needs at least one message")
    return [_parse(f"messages.{number}", item) for number, item in enumerate(value)]


def has_answer(messages: Sequence[Message]) -> bool:
    return any(message.role == "assistant" for message in messages)


def _parse(where: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise ChatError(f"{where}: no object with role and content")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise ChatError(f"{where}.role: {role!r} must be one of {', '.join(ROLES)}{hint}")
    for key in item:
        if key not in ("role", "content"):
            raise ChatError(f"{where}: key {key!r} is not supported: a message has role and content")
    if not isinstance(content, str):
        raise ChatError(f"{where}.content: must be a text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ChatError(f"{where}.content: half a surrogate pair") from None
    if role == "assistant" and not content.strip():
        raise ChatError(f"{where}.content: an empty answer")
    return Message(role, content)
