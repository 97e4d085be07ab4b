"""The documents say what is there: links lead somewhere, names exist, and the drawing is what the code draws."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from megatron_ee.parallel.pipeline.schedules import build_plan
from megatron_ee.parallel.pipeline.simulate import StageCosts, simulate
from megatron_ee.parallel.pipeline.timeline import draw

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PAGES = [DOCS / "life_of_a_step.md", DOCS / "life_of_a_request.md"]
LINES, COLUMNS = 60, 120  # a screen

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(\s*([^)\s]+)\s*\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FILE_AND_NAME = re.compile(r"\[([^\]]*)\]\((\.\./[^)]+\.py)\)\s+`([\w.]+)(?:\(\))?`")
NAME = re.compile(r"`([A-Z]\w*(?:\.\w+)?|[\w.]+(?=\(\)))(?:\(\))?`")


def _prose(path: Path) -> str:
    return FENCED.sub("", path.read_text())


def _id(path: Path) -> str:
    return path.name


@cache
def _defined(path: Path) -> frozenset[str]:
    """Functions and classes of a Python file, and methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return frozenset(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_links_lead_to_files(document: Path) -> None:
    links = [link for link in LINK.findall(_prose(document)) if not link.startswith(("http:", "https:", "#"))]
    missing = [link for link in links if not (document.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_a_link_to_code_shows_the_end_of_its_path(page: Path) -> None:
    links = [(text.replace("\\_", "_"), path) for text, path, _ in FILE_AND_NAME.findall(_prose(page))]
    assert links
    assert [(text, path) for text, path in links if not path.endswith(f"/{text}")] == []


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_the_name_after_a_file_is_defined_there(page: Path) -> None:
    named = [(path, name) for _, path, name in FILE_AND_NAME.findall(_prose(page))]
    assert [(path, name) for path, name in named if name not in _defined((DOCS / path).resolve())] == []


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_every_name_is_defined_in_the_package(page: Path) -> None:
    defined = frozenset[str]().union(*map(_defined, (ROOT / "megatron_ee").rglob("*.py")))
    names = NAME.findall(_prose(page))
    assert len(names) > 10
    assert [name for name in names if name not in defined] == []


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_a_page_is_one_screen(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_the_readme_links_both_pages() -> None:
    links = LINK.findall((ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in PAGES} <= set(links)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, document.name


def test_the_timeline_is_what_the_code_draws() -> None:
    plan = build_plan("1f1b", num_stages=3, num_microbatches=6, has_exits=[True] * 3)
    costs = StageCosts(forward=(2,) * 3, exit=(1,) * 3, backward=(4,) * 3)
    drawing = draw(simulate(plan, costs, transfer=0.5), width=114)  # two columns a unit of time
    assert f"```\n{drawing}\n```\n" in PAGES[0].read_text()
