"""Tests run on the CPU. Processes for multi-rank tests are started once per session and run many cases."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.ranks import RankPool
from hypothesis import settings

from megatron_ee.config import ParallelConfig, load_config
from megatron_ee.device import Device, choose_device
from megatron_ee.log import quiet_dependencies

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from xdist.remote import Producer
    from xdist.scheduler.loadfile import LoadFileScheduling

# How long an example takes says more of the machine than of what is tested; what fails elsewhere is to be found again.
settings.register_profile("tests", deadline=None, print_blob=True)
settings.load_profile("tests")

quiet_dependencies()
_CPU = choose_device("cpu")

from helpers.long_run import StartedRun, read_losses, train_to_the_end, write_long_run  # noqa: E402  (needs a chosen device, as the next does)

from megatron_ee.parallel.mesh import Mesh, close_mesh, open_mesh  # noqa: E402


def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling":
    """Files beside each other share nothing but the machine, of which there is one SLURM."""
    from helpers.sharing import OneSlurm

    return OneSlurm(config, log)


@pytest.fixture(autouse=True)
def _logging_is_left_as_it_was() -> Iterator[None]:
    """A run that is built in this process, instead of in ranks, sets up logging for every test after it."""
    logger = logging.getLogger("megatron_ee")
    yield
    left, logger.handlers[:], logger.propagate = list(logger.handlers), [], True
    assert not left, "this test left handlers on the project's logger"


@pytest.fixture(scope="session")
def cpu() -> Device:
    return _CPU


@pytest.fixture(scope="session")
def mesh(cpu: Device) -> Iterator[Mesh]:
    """This very process as a mesh of one."""
    mesh = open_mesh(ParallelConfig(), cpu)
    yield mesh
    close_mesh()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """One for all tests. It leaves an event loop in this thread."""
    from helpers.browsing import ARGUMENTS, CHROMIUM
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def start_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., StartedRun]:
    """Starts a long run by its name, with overrides, and with environment variables by keyword."""
    config = write_long_run(tmp_path_factory.mktemp("long"))
    return lambda name, *overrides, **settings: StartedRun(config, name, *overrides, **settings)


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of a long run that was left alone, in ranks that are there already."""
    config = load_config(write_long_run(tmp_path_factory.mktemp("undisturbed")), ["name=undisturbed"])
    ranks.run(2, train_to_the_end, config)
    return Path(config.runs) / config.name


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Path) -> list[dict[str, float]]:
    """Its losses."""
    return read_losses(undisturbed_run)
