"""The page before a server with a model."""

import re

import pytest
from helpers.browsing import Watched
from helpers.servers import RunningServer
from playwright.sync_api import Page, expect
from server.page.browsing import outcome, run


@pytest.fixture
def real(tab: Page, watched: Watched, server: RunningServer) -> Page:
    """The page, as new and connected to the model."""
    tab.unroute_all()
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.goto(server.url)
    expect(tab.locator("#facts")).to_contain_text("8 layers · exits after 2, 5")
    return tab


def depths(page: Page) -> dict[str, int]:
    """How many tokens left at each layer, from the table of the first answer."""
    rows = page.locator(".depths").first.locator("tbody tr").all_inner_texts()
    return {row.split()[0].rstrip(","): int(row.split()[-1]) for row in rows}


def test_tokens_leave_where_the_table_says(real: Page, watched: Watched, server: RunningServer) -> None:
    assert "16 tokens in" in outcome(real, "It was")
    assert sum(depths(real).values()) == real.locator(".token").count() == 16
    said = set()
    for place in range(16):
        real.locator(".token").nth(place).focus()
        said.add(re.search(r"(?:layer|all) (\d+)", real.get_by_role("tooltip").inner_text())[1])  # type: ignore[index]
    assert said == {layer for layer, number in depths(real).items() if number}
    assert not watched.complaints
    assert watched.hosts == {server.url.split("/")[2]}


def test_the_slider_reaches_full_depth(real: Page) -> None:
    real.get_by_label("Threshold of confidence").press("End")
    outcome(real, "It was")
    assert depths(real) == {"2": 0, "5": 0, "8": 16}
    real.get_by_label("Threshold of confidence").press("Home")
    outcome(real, "It was")
    assert depths(real) == {"2": 16, "5": 0, "8": 0}


def test_two_answers_side_by_side(real: Page) -> None:
    real.get_by_label("Compare with full depth").check()
    assert re.search(r"of \d+ tokens are the same|All \d+ tokens are the same", outcome(real, "It was"))
    expect(real.get_by_role("article")).to_have_count(2)
    real.get_by_label("Mode").select_option("Self-speculation")
    assert "All 16 tokens are the same (agreement 100 %)." in outcome(real, "It was")


def test_the_servers_words_are_shown(real: Page) -> None:
    run(real, "It was " * 3000)
    expect(real.get_by_role("alert")).to_contain_text("The server refused this request")
    expect(real.get_by_role("alert")).to_contain_text("2048")


def test_stop_ends_it_in_the_server(real: Page, server: RunningServer) -> None:
    real.get_by_label("Most tokens").fill("4096")
    run(real, "It was")
    expect(real.locator(".token").first).to_be_visible()
    real.get_by_role("button", name="Stop").click()
    expect(real.get_by_role("status")).to_contain_text("Stopped.")
    server.wait_until_idle()
    assert real.locator(".token").count() < 4096
