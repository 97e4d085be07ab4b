"""Colours and room: every text can be read in both themes, depths are told apart, and nothing is cut off."""

import itertools
import math

import pytest
from playwright.sync_api import Page, expect
from server.page.browsing import outcome, run
from server.page.stub import Stub

Colour = tuple[float, float, float]  # linear light, each part between 0 and 1

# Machado, Oliveira and Fernandes (2009): what is left of a colour where one kind of cone is missing.
SIGHTS = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}

# Every text that is shown: its words, the colour of its letters and the colour behind them, in sRGB.
TEXTS = """() => {
  const drawing = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const seen = (colour) => {
    drawing.clearRect(0, 0, 1, 1);
    drawing.fillStyle = colour;
    drawing.fillRect(0, 0, 1, 1);
    return [...drawing.getImageData(0, 0, 1, 1).data];
  };
  const texts = [];
  for (const element of document.querySelectorAll("body, body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const field = ["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName);
    if ((!own && !field) || !element.checkVisibility() || element.matches(":disabled, option")) continue;
    let behind = element;
    while (behind && seen(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const back = seen(getComputedStyle(behind).backgroundColor);
    for (const part of field ? ["", "::placeholder"] : [""]) {
      const { color } = getComputedStyle(element, part || null);
      texts.push([element.tagName + part + " " + element.textContent.slice(0, 30), seen(color), back]);
    }
  }
  return texts;
}"""


def linear(colour: list[int]) -> Colour:
    red, green, blue = (
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour[:3]
    )
    return red, green, blue


def luminance(colour: Colour) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def contrast(one: list[int], other: list[int]) -> float:
    low, high = sorted(luminance(linear(each)) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def oklab(colour: Colour) -> Colour:
    red, green, blue = colour
    long = math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    middle = math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    short = math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    return (
        0.2104542553 * long + 0.793617785 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.428592205 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.808675766 * short,
    )


def as_seen(colour: Colour, sight: str) -> Colour:
    red, green, blue = (
        min(1.0, max(0.0, sum(share * part for share, part in zip(row, colour, strict=True)))) for row in SIGHTS[sight]
    )
    return oklab((red, green, blue))


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest, page: Page) -> str:
    page.emulate_media(color_scheme=request.param)
    return request.param


@pytest.mark.usefixtures("theme")
def test_every_text_can_be_read(page: Page, stub: Stub) -> None:
    stub.key = "first"
    run(page, "A story.")
    expect(page.get_by_role("alert")).to_contain_text("API key")
    texts = page.evaluate(TEXTS)
    stub.key = None
    page.get_by_label("Compare with full depth").check()
    page.get_by_label("Mode").select_option("Self-speculation")
    outcome(page, "A story.")
    page.locator(".token").first.focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    texts += page.evaluate(TEXTS)
    unread = {name: contrast(ink, paper) for name, ink, paper in texts if contrast(ink, paper) < 4.5}
    assert not unread
    names = " ".join(name for name, *_ in texts)
    assert all(part in names for part in ("::placeholder", "SPAN The", "STRONG", "P Token 1", "BUTTON Run", "LI 3"))


@pytest.mark.usefixtures("theme")
def test_every_depth_can_be_read_and_told_from_its_neighbours(page: Page, stub: Stub) -> None:
    # A distance of 0.02 can just be noticed.
    for num_layers, exits, apart in [(12, [3, 6, 9], 0.04), (24, list(range(1, 24)), 0.0)]:
        stub.facts.update(num_layers=num_layers, exits=exits)
        page.reload()
        expect(page.locator(".ladder li.painted")).to_have_count(len(exits) + 1)
        page.locator(".ladder li.painted").evaluate_all("all => all.forEach((each) => (each.textContent = 'x'))")
        painted = [(ink, paper) for name, ink, paper in page.evaluate(TEXTS) if name == "LI x"]
        assert len(painted) == len(exits) + 1
        assert min(contrast(ink, paper) for ink, paper in painted) >= 4.5
        for sight in SIGHTS:
            colours = [as_seen(linear(paper), sight) for _, paper in painted]
            for one, other in itertools.pairwise(colours):
                assert other[0] < one[0], f"{sight}: lightness falls with depth"
                assert math.dist(one, other) > apart, f"{sight}: {one} and {other}"


def test_the_button_changes_the_theme(page: Page) -> None:
    button = page.get_by_role("button", name="Dark theme")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    expect(button).to_have_attribute("aria-pressed", "false")
    page.emulate_media(color_scheme="dark")
    expect(button).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(paper)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(paper) == light != dark
    button.click()
    assert page.evaluate(paper) == dark


@pytest.mark.slow
@pytest.mark.parametrize(("width", "text"), [(320, 100), (640, 100), (1280, 200)])
def test_nothing_is_cut_off(page: Page, stub: Stub, width: int, text: int) -> None:
    """640 points are what a screen of 1280 has left at a zoom of 200 %."""
    page.set_viewport_size({"width": width, "height": 700})
    page.evaluate(f"document.documentElement.style.setProperty('font-size', '{text}%')")
    stub.key = "first"
    run(page, "A story.")
    expect(page.get_by_role("alert")).to_contain_text("API key")
    stub.key = None
    page.get_by_label("Compare with full depth").check()
    outcome(page, "Averylongwordwithoutaspace" * 20)
    wide = """[...document.querySelectorAll("body *:not(.skip)")].filter((each) => each.checkVisibility())
      .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5 || each.scrollWidth > innerWidth)
      .map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    for place in (0, 10, 22):
        page.locator(".token").nth(place).focus()
        box = page.get_by_role("tooltip").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] >= 0 and box["y"] + box["height"] <= 700


def test_who_wants_no_motion_gets_none(page: Page) -> None:
    outcome(page, "A story.")
    duration = "getComputedStyle(document.querySelector('.bar')).transitionDuration"
    assert page.evaluate(duration) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(duration) == "0.2s"
