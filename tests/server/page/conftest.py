"""One browser for all tests of the page, and a stub to open it from."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, expect, sync_playwright
from server.page.stub import Served, Stub

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

expect.set_options(timeout=15_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    server = Served(stub.app)
    yield stub, server.url
    server.close()


@pytest.fixture
def stub(served: tuple[Stub, str]) -> Stub:
    """As new."""
    stub, _ = served
    stub.key, stub.facts = None, stub.usual_facts()
    stub.asked.clear()
    stub.ended.clear()
    return stub


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


@pytest.fixture(scope="session")
def tab(browser: Browser, served: tuple[Stub, str]) -> Page:
    """One for all tests: opening the page anew is what takes no time."""
    return browser.new_context(base_url=served[1]).new_page()


@pytest.fixture
def watched(tab: Page) -> Iterator[Watched]:
    watched = Watched()
    listeners = {"console": watched.heard, "pageerror": watched.failed, "request": watched.requested}
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield watched
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)


@pytest.fixture
def page(tab: Page, stub: Stub, watched: Watched) -> Page:
    """The page, as new and connected to the stub."""
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light", reduced_motion="reduce")
    tab.goto("/")
    expect(tab.locator("#facts")).to_contain_text("layers")
    return tab
