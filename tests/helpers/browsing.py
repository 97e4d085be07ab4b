"""A browser for tests, and what a page does in it beside what was asked of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import ConsoleMessage, Error, Page, Request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Watched:
    """What the page did beside what was asked of it."""

    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def failed(self, error: Error) -> None:
        self.complaints.append(str(error))

    def requested(self, request: Request) -> None:
        self.hosts.add(request.url.split("/")[2])


@contextmanager
def watching(tab: Page) -> Iterator[Watched]:
    """While it is open."""
    watched = Watched()
    listeners = {"console": watched.heard, "pageerror": watched.failed, "request": watched.requested}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield watched
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
