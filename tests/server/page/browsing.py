"""What the tests of the page do in a browser."""

from playwright.sync_api import Page, expect


def run(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Run").click()


def outcome(page: Page, prompt: str) -> str:
    """What is said of an answer once it has ended."""
    run(page, prompt)
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    return page.get_by_role("status").inner_text()
