"""Streams whose clients do not read, or go away."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from helpers.loops import run

from megatron_ee.server.streams import EventStream, event

_SCOPE = {"type": "http", "asgi": {"spec_version": "2.3"}}


async def _events(closed: list[bool]) -> AsyncIterator[str]:
    try:
        for number in range(1000):
            yield event({"number": number})
            await asyncio.sleep(0)
    finally:
        closed.append(True)


def _sent(reads: int, *, leaves: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """What a client gets that reads so many messages, and then no more, or goes away; and who was told."""
    sent: list[dict[str, Any]] = []
    left: list[str] = []
    gone = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        if len(sent) == reads:
            if leaves:
                gone.set()
            await asyncio.Event().wait()
        sent.append(message)

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def serve() -> None:
        stream = EventStream(_events([]), timeout=0.05 if not leaves else 60, leave=lambda: left.append("left"))
        await asyncio.wait_for(stream(_SCOPE, receive, send), 5)

    run(serve())
    return sent, left


def test_a_client_that_stops_reading_is_left() -> None:
    sent, left = _sent(5)
    assert left == ["left"]
    assert len(sent) == 5 and sent[-1]["more_body"], "the answer must not look whole"


def test_a_client_that_goes_away_is_left_at_once() -> None:
    _, left = _sent(5, leaves=True)
    assert left == ["left"]


def test_an_event_is_one_line_whatever_it_holds() -> None:
    text = event({"text": "a\nb\r\n\u2028data: x"})
    assert text.count("\n") == 2 and text.endswith("\n\n") and "\r" not in text
