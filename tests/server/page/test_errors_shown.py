"""What goes wrong is said in the server's words, and what has arrived stays."""

import pytest
from helpers.browsing import Watched
from playwright.sync_api import Page, expect
from server.page.browsing import outcome, run
from server.page.stub import Stub, story

BROKE_OFF = "The answer broke off "


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("queue", "Too much at once 64 requests wait already Try again in 7 s."),
        ("bounds", "The server refused this request early_exit.threshold: 0.10 is below this server's 0.57"),
        ("proxy", "The server failed It answered 502 Bad Gateway"),
    ],
)
def test_a_refusal(page: Page, prompt: str, said: str) -> None:
    assert outcome(page, prompt) == "Not complete."
    expect(page.get_by_role("alert")).to_have_text(said)
    expect(page.locator(".waiting")).to_have_text("No tokens.")
    assert "23 tokens" in outcome(page, "A story.")
    expect(page.get_by_role("alert")).to_be_empty()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("error", "a stage was lost <b>"),
        ("lost", "The connection was lost before the answer was complete."),
        ("short", "The server closed the connection before the answer was complete."),
        ("nonsense", "The server sent what is not JSON."),
    ],
)
def test_an_answer_that_breaks_off(page: Page, stub: Stub, prompt: str, said: str) -> None:
    page.get_by_label("Compare with full depth").check()
    run(page, prompt)
    expect(page.locator(".token")).to_have_count(3)
    stub.breaks_off = True
    expect(page.get_by_role("status")).to_contain_text("Not complete. Early exit, threshold 0.90: 3 tokens in ")
    expect(page.get_by_role("alert")).to_have_text(BROKE_OFF + said)
    expect(page.locator(".token")).to_have_text([each["text"] for each in story("early_exit")[:3]])
    expect(page.locator("#verdict")).to_be_hidden()  # one answer alone cannot be compared
    expect(page.locator(".waiting")).to_have_text(["", "No tokens."])


def test_a_server_that_is_gone(page: Page) -> None:
    page.context.set_offline(True)
    try:
        outcome(page, "A story.")
        expect(page.get_by_role("alert")).to_have_text(
            "The server cannot be reached There is no connection to it, or it is not running."
        )
    finally:
        page.context.set_offline(False)
    assert "23 tokens" in outcome(page, "A story.")


def test_a_server_that_is_not_there_yet(page: Page, stub: Stub) -> None:
    """Run asks for the model, too, and asks once, however often it is pressed."""
    page.route("**/v1/models", lambda route: route.fulfill(status=503, json={"error": {"message": "it loads"}}))
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("Not now it loads")
    expect(page.locator("#facts")).to_have_text("The server's model is not known yet; Run asks again.")
    outcome(page, "A story.")
    expect(page.get_by_role("alert")).to_have_text("Not now it loads")
    page.unroute("**/v1/models")
    page.evaluate("for (let i = 0; i < 3; i++) document.querySelector('form').requestSubmit()")
    expect(page.get_by_role("status")).to_contain_text("23 tokens")
    assert len(stub.asked) == 1


def test_a_server_of_another_kind(page: Page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "other"}]}))
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("Not this server Its list of models says nothing of early exits.")
    page.unroute("**/v1/models")


def test_a_key_is_asked_for_and_kept_nowhere(page: Page, stub: Stub) -> None:
    field = page.get_by_label("API key")
    expect(field).to_be_hidden()  # this server asks for none
    stub.key = "a-secret-key"
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("API key no key, or one that is not known")
    for wrong in ("another", "schlüssel"):
        field.fill(wrong)
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key")
        expect(field).to_have_attribute("aria-invalid", "true")
    assert field.get_attribute("type") == "password"
    field.fill(" a-secret-key ")
    field.press("Enter")
    expect(page.locator("#facts")).to_contain_text("12 layers")
    assert "23 tokens" in outcome(page, "A story.")
    assert field.get_attribute("aria-invalid") is None
    kept = "[location.href, document.cookie, JSON.stringify({...localStorage, ...sessionStorage}), history.state]"
    assert "secret" not in str(page.evaluate(kept))
    page.reload()
    expect(field).to_have_value("")


def test_a_new_key_leaves_the_form_as_it_is(page: Page, stub: Stub) -> None:
    stub.key = "first"
    run(page, "A story.")
    field = page.get_by_label("API key")
    expect(page.get_by_role("alert")).to_contain_text("API key")
    page.get_by_label("Most tokens").fill("5")
    field.fill("first")
    outcome(page, "A story.")
    expect(page.get_by_role("alert")).to_be_empty()
    assert stub.asked[-1]["max_tokens"] == 5


def test_a_fault_of_the_page_itself_is_said(page: Page, watched: Watched) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "tiny", "early_exit": {}}]}))
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("The page failed")
    assert watched.complaints
    page.unroute("**/v1/models")
