"""The thread that listens: an event loop with an HTTP server in it. The engine has the main thread, where signals are
heard.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from megatron_ee.errors import FieldError

_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """An address to listen at, before anything that takes long.

    Raises:
        FieldError: it cannot be had.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise FieldError("serving.host", f"{host}: {getattr(error, 'strerror', None) or error}") from error
    family, kind, protocol, _, address = infos[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        field = "serving.host" if error.errno == 99 else "serving.port"  # EADDRNOTAVAIL
        raise FieldError(field, f"{host}:{port}: {error.strerror}") from error
    listening.set_inheritable(True)
    return listening


class Listener:
    """
    Args:
        make_app: makes the ASGI app, in its loop.

    Attributes:
        loop: there once `start` has returned.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, listening: socket.socket, make_app: Callable[[asyncio.AbstractEventLoop], Any]) -> None:
        self._socket, self._make_app = listening, make_app
        self._server: uvicorn.Server | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Listen; answers come from the app from now on."""
        self._thread.start()
        self._begun.wait()

    def stop(self) -> None:
        """Answers that are still under way are cut off after a moment."""
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(timeout=10)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        try:
            app = self._make_app(self.loop)
            config = uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                server_header=False,
                date_header=True,
                log_config=None,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=32 * 1024,
            )
            config.load()
            self._server = uvicorn.Server(config)
        finally:
            self._begun.set()
        await self._server.serve(sockets=[self._socket])


def quiet_server() -> None:
    """What uvicorn says of each connection that breaks is no news."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
