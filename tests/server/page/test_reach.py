"""The page without a mouse and without sight: names of controls, the way of Tab, the notes on tokens."""

import re

import pytest
from playwright.sync_api import Page, expect
from server.page.browsing import outcome
from server.page.stub import STORY, Stub

HERE = """() => {
  const { id, tagName, className, name, value } = document.activeElement;
  return id || (name && `${name} ${value}`) || className || tagName;
}"""
OUTLINE = "(({ outlineStyle, outlineWidth }) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"


def test_every_control_has_a_name(page: Page, stub: Stub) -> None:
    stub.key = "first"
    outcome(page, "A story.")
    stub.key = None
    page.get_by_label("Compare with full depth").check()
    outcome(page, "A story.")
    snapshot = page.locator("body").aria_snapshot()
    controls = re.findall(
        r"- (button|checkbox|combobox|group|link|listbox|option|radio|slider|spinbutton|table|textbox)\b(.*)", snapshot
    )
    assert {role for role, _ in controls} >= {"button", "combobox", "listbox", "radio", "slider", "spinbutton", "table"}
    assert all(re.match(r' ".+"', rest) for role, rest in controls if rest != ": Plain text"), controls
    for landmark in ("banner", "main", 'form "Request"', 'region "Answers"', "contentinfo"):
        assert snapshot.count(f"- {landmark}") == 1
    assert snapshot.count("- status") == snapshot.count("- alert") == 1
    levels = re.findall(r"level=(\d)", snapshot)
    assert levels == ["1", "2", "2"]


def test_tab_reaches_all_and_shows_where_it_is(page: Page, stub: Stub) -> None:
    stub.key = "first"
    outcome(page, "A story.")
    stub.key = None
    outcome(page, "A story.")
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    way = []
    while (here := (page.keyboard.press("Tab"), page.evaluate(HERE))[1]) != "BODY":
        assert page.evaluate(OUTLINE)[0] != "none" and float(page.evaluate(OUTLINE)[1][:-2]) >= 2
        way.append(here)
        assert len(way) < 30
    assert way == [
        "skip",
        "key",
        "theme",
        "kind chat",
        "prompt",
        "compare on",
        "run",
        "mode",
        "threshold",
        "min_exit",
        "kv_policy",
        "temperature",
        "max_tokens",
        "seed",
        "token painted",
        "SUMMARY",
    ]


def test_the_first_link_leads_to_the_answer(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Answers")).to_be_focused()


def test_a_run_by_keyboard(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("A story.")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("23 tokens")


def test_arrow_keys_move_between_tokens(page: Page) -> None:
    outcome(page, "A story.")
    note = page.get_by_role("tooltip")
    page.locator(".token").first.focus()
    tokens = page.locator(".token")
    last = len(STORY.split(" ")) - 1
    for key, place in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("ArrowDown", 14),
        ("ArrowDown", 14),
        ("ArrowUp", 1),
        ("End", last),
        ("ArrowRight", last),
        ("Home", 0),
        ("ArrowLeft", 0),
    ]:
        page.keyboard.press(key)
        expect(tokens.nth(place)).to_be_focused()
        expect(note).to_contain_text(f"Token {place + 1}: ")
        expect(page.locator(".token[aria-describedby=note]")).to_have_count(1)
        expect(tokens.nth(place)).to_have_attribute("aria-describedby", "note")
        expect(page.locator(".token[tabindex='0']")).to_have_count(1)
        expect(page.locator(".token[aria-selected=true]")).to_have_count(1)
    page.keyboard.press("Shift+Tab")
    expect(note).to_be_hidden()
    page.keyboard.press("Tab")
    expect(tokens.first).to_be_focused()


def test_the_note_says_what_is_known_of_a_token(page: Page) -> None:
    outcome(page, "A story.")
    note = page.get_by_role("tooltip")
    page.locator(".token").nth(1).focus()
    lines = ['Token 2: " ladder"', "Left at layer 3 of 12", "Confidence 0.980", "Not drafted"]
    expect(note.locator("p")).to_have_text(lines)
    page.locator(".token").nth(12).focus()
    expect(note).to_contain_text('Token 13: " .\\n"')
    page.locator(".token").first.focus()
    expect(note).to_contain_text("Ran all 12 layers")


@pytest.mark.parametrize("pointed", [True, False])
def test_escape_closes_the_note(page: Page, pointed: bool) -> None:
    outcome(page, "A story.")
    note = page.get_by_role("tooltip")
    subject = page.locator(".token").nth(4)
    if pointed:
        subject.hover()
    else:
        subject.focus()
    expect(note).to_be_visible()
    page.keyboard.press("Escape")
    expect(note).to_be_hidden()
    expect(page.locator("[aria-describedby=note]")).to_have_count(0)


def test_the_note_stays_while_the_pointer_is_on_it(page: Page) -> None:
    outcome(page, "A story.")
    note = page.get_by_role("tooltip")
    page.locator(".token").nth(1).hover()
    note.hover()
    page.wait_for_timeout(250)
    expect(note).to_contain_text(" ladder")
    page.locator("h1").hover()
    expect(note).to_be_hidden()
