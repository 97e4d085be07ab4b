"""The page as its readers meet it: what it tells of the model, what it asks for, and what it shows of an answer."""

import math
import re
from pathlib import Path

import pytest
from helpers.browsing import Watched
from playwright.sync_api import Page, expect
from server.page.browsing import outcome, run
from server.page.stub import HOSTILE, PAGE, Stub, story


def test_it_tells_of_the_model_and_asks_nobody_else(page: Page, watched: Watched, tmp_path: Path) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(page.locator("#facts")).to_have_text("12 layers · exits after 3, 6, 9 · room for 2048 tokens")
    assert "23 tokens in" in outcome(page, "A story.")
    picture = tmp_path / "runs/page/pictures/page.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000
    assert not watched.complaints
    assert watched.hosts == {page.url.split("/")[2]}
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_it_offers_what_the_bounds_allow(page: Page) -> None:
    slider = page.get_by_label("Threshold of confidence")
    assert [slider.get_attribute(name) for name in ("min", "max")] == ["0.57", "1"]
    expect(slider).to_have_value("0.9")
    for key, value, said in [
        ("Home", "0.57", "0.57"),
        ("ArrowRight", "0.58", "0.58"),
        ("End", "1", "1.00, full depth"),
    ]:
        slider.press(key)
        expect(slider).to_have_value(value)
        expect(slider).to_have_attribute("aria-valuetext", said)
        expect(page.locator("#threshold-value")).to_have_text(said[:4])
    expect(page.locator("#threshold-hint")).to_have_text("1.00 = full depth")
    offered = {name: page.locator(f"#{name} option").all_inner_texts() for name in ("mode", "min_exit", "kv_policy")}
    assert offered == {
        "mode": ["Early exit", "Self-speculation", "Full depth"],
        "min_exit": ["layer 3", "layer 6", "layer 9"],
        "kv_policy": ["recompute"],
    }
    expect(page.get_by_label("Most tokens")).to_have_value("100")


def test_bounds_that_are_null_allow_all(page: Page, stub: Stub) -> None:
    stub.facts["bounds"].update(modes=None, kv_policies=None, threshold=0.0, min_exit=0)
    stub.facts["defaults"].update(min_exit=0, threshold=0.925, thresholds={"3": 0.8})
    stub.facts["has_chat_template"] = False
    page.reload()
    expect(page.locator("#mode option")).to_have_count(5)
    expect(page.locator("#kv_policy option")).to_have_count(3)
    expect(page.locator("#min_exit option")).to_have_text(["any", "layer 3", "layer 6", "layer 9"])
    expect(page.locator("#threshold-value")).to_have_text("0.925")
    expect(page.locator("#threshold-hint")).to_have_text("1.00 = full depth; until it is moved, layer 3 at 0.8")
    expect(page.get_by_role("radio")).to_have_count(0)
    page.get_by_label("Threshold of confidence").press("End")
    outcome(page, "A story.")
    assert stub.asked[-1]["early_exit"] == {"threshold": 1}, "for all exits"


def test_it_asks_for_what_the_form_says(page: Page, stub: Stub) -> None:
    outcome(page, "A story.")
    page.get_by_label("text to go on with").check()
    page.get_by_label("Threshold of confidence").press("Home")
    page.get_by_label("Earliest exit").select_option("layer 6")
    page.get_by_label("Temperature").fill("0.75")
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("Seed").fill("11")
    outcome(page, "A story.")
    page.get_by_label("Mode").select_option("Full depth")
    outcome(page, "A story.")
    common = {"model": "tiny", "stream": True}
    chat = {"path": "chat/completions", "messages": [{"role": "user", "content": "A story."}]}
    drawn = {"path": "completions", "prompt": "A story.", "max_tokens": 5, "temperature": 0.75, "seed": 11}
    assert stub.asked == [
        {**common, **chat, "max_tokens": 100, "temperature": 0, "early_exit": {}},
        {**common, **drawn, "early_exit": {"threshold": 0.57, "min_exit": 6}},
        {**common, **drawn, "early_exit": {"mode": "full"}},
    ]


def test_the_form_refuses_what_the_server_would(page: Page, stub: Stub) -> None:
    page.get_by_label("Most tokens").fill("101")
    run(page, "A story.")
    expect(page.get_by_label("Most tokens")).to_be_focused()
    assert not stub.asked


def test_depths_are_counted(page: Page) -> None:
    said = outcome(page, "A story.")
    layers = [each["exit_layer"] for each in story("early_exit")]
    rows = [row.split() for row in page.locator(".depths tbody tr").all_inner_texts()]
    names = {3: "3", 6: "6", 9: "9", 12: "12, all"}
    shares = {layer: math.floor(100 * layers.count(layer) / len(layers) + 0.5) for layer in names}
    assert rows == [f"{name} {shares[layer]} % {layers.count(layer)}".split() for layer, name in names.items()]
    mean = sum(layers) / len(layers)
    assert "23 tokens in" in said and f"mean depth {mean:.1f} of 12 layers; it ended by itself" in said
    figures = dict(
        zip(*(page.locator(f".figures {tag}:visible").all_inner_texts() for tag in ("dt", "dd")), strict=True)
    )
    assert figures.keys() == {"Tokens", "Tokens / s", "First token", "Mean depth"}
    assert figures["Tokens"] == "23" and figures["Mean depth"] == f"{mean:.1f} of 12"
    assert float(figures["Tokens / s"]) > 0 and re.fullmatch(r"\d+ ms", figures["First token"])


def test_tokens_arrive_one_by_one_until_they_are_stopped(page: Page, stub: Stub) -> None:
    run(page, "slow")
    tokens = page.locator(".token")
    expect(tokens.nth(3)).to_be_visible()
    expect(page.locator(".depths tbody tr").nth(1)).not_to_contain_text("0 %\t0")
    expect(page.get_by_role("status")).to_have_text("Running …")  # it does not read each token out
    page.get_by_role("button", name="Stop").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Stopped. Early exit, threshold 0.90: ")
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_empty()
    assert tokens.count() >= 4
    for _ in range(200):
        if stub.ended:
            break
        page.wait_for_timeout(20)
    assert stub.ended == ["slow"]  # the server has been told


@pytest.mark.parametrize("prompt", ["whole", "cut"])
def test_an_answer_cut_anywhere_is_the_same(page: Page, prompt: str) -> None:
    outcome(page, prompt)
    texts = [each["text"] for each in story("early_exit")]
    assert [option.text_content() for option in page.locator(".token").all()] == texts
    page.get_by_text("Plain text").click()
    assert page.locator("pre").text_content() == "".join(texts)


def test_what_a_model_writes_is_text(page: Page, watched: Watched) -> None:
    outcome(page, "hostile")
    assert [option.text_content() for option in page.locator(".token").all()] == HOSTILE
    for place in range(len(HOSTILE)):
        page.locator(".token").nth(place).focus()
    page.locator(".token").nth(0).focus()
    expect(page.get_by_role("tooltip")).to_contain_text('"<script>window.harmed = 1</script>"')
    assert page.evaluate("window.harmed") is None
    assert page.locator("img, #answers script, #note script").count() == 0
    assert not watched.complaints


def test_drafts_are_told_apart(page: Page) -> None:
    page.get_by_label("Mode").select_option("Self-speculation")
    expect(page.get_by_label("Threshold of confidence")).to_be_disabled()
    outcome(page, "A story.")
    expect(page.locator(".figures")).to_contain_text("Accepted")
    expect(page.locator("[data-figure=acceptance]")).to_have_text("75 %")
    drafted = [each["drafted"] for each in story("speculative")]
    assert page.locator(".token.drafted").count() == sum(drafted)
    page.locator(".token").nth(drafted.index(True)).focus()
    expect(page.get_by_role("tooltip")).to_contain_text("Drafted by an exit, accepted by full depth")


def test_it_compares_with_full_depth(page: Page, stub: Stub) -> None:
    page.get_by_label("Compare with full depth").check()
    page.get_by_label("Temperature").fill("0.5")
    said = outcome(page, "A story.")
    assert "The first 7 of 23 tokens are the same (agreement 30 %); token 8, marked, is the first to differ." in said
    assert re.search(r"\d+\.\d\d times the tokens per second of full depth", said)
    expect(page.locator(".differs")).to_have_text([story("early_exit")[7]["text"], " though"])
    page.locator(".differs").nth(1).focus()
    expect(page.get_by_role("tooltip")).to_contain_text("The first that differs from the other answer")
    first, second = stub.asked
    assert first.pop("early_exit") == {} and second.pop("early_exit") == {"mode": "full"}
    assert first == second and "seed" in first  # both draw the same random numbers
    left, right = (each.bounding_box() for each in page.get_by_role("article").all())
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] < right["x"]


def test_answers_that_agree(page: Page) -> None:
    page.get_by_label("Mode").select_option("Full depth")
    page.get_by_label("Compare with full depth").check()
    assert "All 12 tokens are the same (agreement 100 %)." in outcome(page, "A story.")
    expect(page.locator(".differs")).to_have_count(0)


def test_files_are_short_and_name_no_outside_host() -> None:
    files = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= files.keys()
    for name, text in files.items():
        assert len(text.splitlines()) <= 300, name
        assert max(map(len, text.splitlines())) <= 120, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"(local|session)Storage|indexedDB|cookie", text), name
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", files["index.html"])
