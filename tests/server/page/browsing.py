"""What the tests of the page do in a browser."""

import shutil
from dataclasses import dataclass, field

from playwright.sync_api import ConsoleMessage, Error, Page, Request, expect

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


def run(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Run").click()


def outcome(page: Page, prompt: str) -> str:
    """What is said of an answer once it has ended."""
    run(page, prompt)
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    return page.get_by_role("status").inner_text()
