"""Pages that stand for themselves: what is put in stays text, and nothing is fetched."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from html_page import HtmlPage

_EVIL = "<script>alert(1)</script>"


class _Seen(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _page(text: str) -> HtmlPage:
    page = HtmlPage(text, subtitle=text)
    for number in range(3):
        page.heading(f"{text} {number}")
    page.text(text)
    page.points([text])
    page.facts({text: text, "rate": 0.25, "count": 3, "unknown": None})
    page.table([text, "speed", "share"], [[text, 1.5, "93.1 %"], ["other", None, "2.0 %"]], caption=text)
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    page.picture(figure, alt=text, caption=text)
    page.details(text, text)
    return page


def test_names_and_values_stay_text(tmp_path: Path) -> None:
    _page(_EVIL).save(tmp_path / "page.html")
    seen = _Seen((tmp_path / "page.html").read_text())
    assert not seen.all("script")
    assert seen.texts.count(_EVIL) == 13  # wherever it was put in, but for names of sections, and alt and label
    assert seen.all("img")[0]["alt"] == _EVIL


def test_nothing_is_fetched(tmp_path: Path) -> None:
    _page("report").save(tmp_path / "page.html")
    seen = _Seen((tmp_path / "page.html").read_text())
    linked = [of[name] or "" for _, of in seen.elements for name in ("src", "href") if name in of]
    assert len(linked) == 4 and all(link.startswith(("data:image/png", "#section-")) for link in linked)
    (policy,) = [of["content"] for of in seen.all("meta") if of.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_contents_lead_to_sections(tmp_path: Path) -> None:
    _page("report").save(tmp_path / "page.html")
    seen = _Seen((tmp_path / "page.html").read_text())
    assert [of["href"] for of in seen.all("a")] == [f"#{of['id']}" for of in seen.all("h2")]


def test_numbers_stand_right_and_what_is_missing_is_a_dash(tmp_path: Path) -> None:
    _page("report").save(tmp_path / "page.html")
    seen = _Seen((tmp_path / "page.html").read_text())
    assert [of.get("class") for of in seen.all("td")] == [None, "right", "right", None, "right", "right"]
    assert seen.texts.count("-") == 2 and "93.1 %" in seen.texts and "1.5" in seen.texts


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        _page("report").save(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.html", "b.html"}


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="2 values for 1 columns"):
        HtmlPage("report").table(["one"], [["1", "2"]])


def test_a_column_with_text_stands_left(tmp_path: Path) -> None:
    page = HtmlPage("report")
    page.table(
        ["hash", "begun", "change"], [["12", "2026-11-27 10:58", "-0.5 %"], ["1a2b", "2026-11-28 10:58", "+1,200"]]
    )
    page.save(tmp_path / "page.html")
    seen = _Seen((tmp_path / "page.html").read_text())
    assert [of.get("class") for of in seen.all("td")] == [None, None, "right"] * 2


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n of which the rest is missing"])
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a whole PNG picture"):
        HtmlPage("report").image(content, alt="none")
