"""What is installed is the package, the whole package and nothing else, and it trains away from this folder.

`make check-wheel` does the same in clean environments, with each extra.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
from helpers.runs import run_config, write_small_dataset

import megatron_ee
from megatron_ee.config import to_yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _name(requirement: str) -> str:
    """Of the package, as indexes spell it."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked into. It is built from a copy, where no earlier build has left anything."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "megatron_ee", source / "megatron_ee", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def distribution(installed: Path) -> PathDistribution:
    (information,) = installed.glob("*.dist-info")
    return Distribution.at(information)


def test_the_wheel_holds_the_package_and_nothing_else(installed: Path) -> None:
    (information,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"megatron_ee", information.name}
    packed = {path.relative_to(installed) for path in (installed / "megatron_ee").rglob("*") if path.is_file()}
    modules = {path.relative_to(ROOT) for path in (ROOT / "megatron_ee").rglob("*.py")}
    page = {path.relative_to(ROOT) for path in (ROOT / "megatron_ee/server/page").glob("*.*")}
    assert packed == modules | page | {Path("megatron_ee/py.typed")}
    assert (information / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_its_metadata_ask_for_what_the_project_does(distribution: PathDistribution) -> None:
    assert distribution.version == megatron_ee.__version__
    assert set(distribution.metadata.get_all("Provides-Extra") or ()) == EXTRAS.keys()
    asked: dict[str, set[str]] = {"": set()} | {extra: set() for extra in EXTRAS}
    for requirement in distribution.requires or ():
        match = re.search(r"extra == \"(.+)\"", requirement)
        asked[match[1] if match else ""].add(_name(requirement))
    expected = {"": PROJECT["dependencies"], **EXTRAS}
    assert asked == {extra: {_name(requirement) for requirement in names} for extra, names in expected.items()}


def test_it_trains_in_a_folder_of_its_own(installed: Path, tmp_path: Path) -> None:
    write_small_dataset(tmp_path)
    config = run_config(tmp_path, name="installed", training={"train_iters": 2})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    imported = python("-c", "import megatron_ee; print(megatron_ee.__file__)")
    assert Path(imported.stdout.strip()) == installed / "megatron_ee/__init__.py", imported.stderr
    trained = python("-m", "megatron_ee.training", "run.yaml")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs/installed/checkpoints/latest/format.json").is_file()


def test_every_dependency_has_its_exact_version() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins == sorted(pins, key=str.lower)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    listed = {_name(requirement) for names in (PROJECT["dependencies"], *EXTRAS.values()) for requirement in names}
    assert listed <= {_name(pin) for pin in pins}
