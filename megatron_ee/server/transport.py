"""What is refused before anybody looks into it: requests without a key, and bodies that are too long, or too slow; and
what browsers are told.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_ee.server.protocol.errors import ApiError

_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_INTERFACE = "/v1/"
_CLOSE = (b"connection", b"close")


class Bounded:
    """Around an app: reads bodies as a whole.

    Args:
        most_bytes: of a body.
        seconds: for it to arrive.
        admit: looks at the header `authorization` of what is asked of the interface; raises ApiError.
        refused: is told what was refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        most_bytes: int,
        seconds: float,
        admit: Callable[[str | None], object],
        refused: Callable[[ApiError], None],
    ) -> None:
        self._app, self._most, self._seconds, self._admit, self._refused = app, most_bytes, seconds, admit, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            if scope["path"].startswith(_INTERFACE):
                self._admit(_authorization(scope))
            body = await asyncio.wait_for(self._read(scope, receive), self._seconds)
        except (ApiError, TimeoutError) as error:
            late = ApiError(408, f"the request did not arrive within {self._seconds:g} s", code="timeout")
            refusal = error if isinstance(error, ApiError) else late
            self._refused(refusal)
            await _refuse(refusal, send_with_headers)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send_with_headers)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None: the client has gone."""
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and lengths[0].isdigit():
            self._check(int(lengths[0]))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self._check(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ApiError(413, f"a request may have {self._most} bytes", code="too_large")


def _authorization(scope: Scope) -> str | None:
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return found[0].decode("latin-1") if found else None


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(error: ApiError, send: Callable[[Any], Any]) -> None:
    """And close the connection: the rest of the request may still be on its way."""
    body = json.dumps(error.body).encode()
    kind, length = (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))
    more = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": [kind, length, _CLOSE, *more]})
    await send({"type": "http.response.body", "body": body})
