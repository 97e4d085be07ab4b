"""One server for all tests that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from helpers.saved import save_random_run
from helpers.servers import RunningServer, start_server

from megatron_ee.parallel.mesh import Mesh


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_random_run(folder, mesh, layers=[2, 5])
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """Whoever comes is served."""
    running = start_server(checkpoint, "inference.max_batch_size=4")
    yield running
    assert running.end() == 0, "\n".join(running.log)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
