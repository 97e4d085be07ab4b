"""Answers while they grow, and clients that leave."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

Result = TypeVar("Result")

DONE = "data: [DONE]\n\n"


def event(body: Any) -> str:
    """As one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. A client that does not read them loses them.

    Args:
        events: closed in the end, whatever the end is.
        timeout: seconds for the client to read on.
        leave: is called in the end.
    """

    def __init__(self, events: AsyncIterator[str], *, timeout: float, leave: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._timeout, self._leave = timeout, leave

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            await asyncio.wait_for(send(message), self._timeout)

        try:
            with suppress(TimeoutError):  # the connection is closed, since the answer is not whole
                await super().stream_response(send_in_time)
        finally:
            self._leave()


async def unless_gone(request: Request, work: Awaitable[Result], leave: Callable[[], None]) -> Result | None:
    """What some work returns; None: the client has gone before, and nobody waits for it.

    Args:
        leave: is called in the end.
    """
    working, going = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, going):
            task.cancel()
        leave()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
