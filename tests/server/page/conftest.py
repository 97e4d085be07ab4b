"""One tab for all tests of the page, and a stub to open it from."""

from collections.abc import Iterator

import pytest
from helpers.browsing import Watched, watching
from playwright.sync_api import Browser, Page, expect
from server.page.stub import Served, Stub

expect.set_options(timeout=15_000)


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
    stub.key, stub.facts, stub.breaks_off = None, stub.usual_facts(), False
    stub.asked.clear()
    stub.ended.clear()
    return stub


@pytest.fixture(scope="session")
def tab(browser: Browser, served: tuple[Stub, str]) -> Page:
    """One for all tests: opening the page anew is what takes no time."""
    tab = browser.new_context(base_url=served[1]).new_page()
    tab.set_default_timeout(15_000)
    return tab


@pytest.fixture
def watched(tab: Page) -> Iterator[Watched]:
    with watching(tab) as watched:
        yield watched


@pytest.fixture
def page(tab: Page, stub: Stub, watched: Watched) -> Page:
    """The page, as new and connected to the stub."""
    tab.unroute_all()
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light", reduced_motion="reduce")
    tab.goto("/")
    expect(tab.locator("#facts")).to_contain_text("layers")
    return tab
