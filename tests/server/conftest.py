"""One server for all tests that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from helpers.keys import write_keys
from helpers.prompts import THRESHOLD
from helpers.saved import save_random_run
from helpers.servers import GuardedServer, RunningServer, start_server

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


@pytest.fixture(scope="session")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    """Clients a, b, c; one that may have four texts at a time, and one that is poor."""
    folder = tmp_path_factory.mktemp("guarded")
    budget = {"layer_tokens": 2000, "window": 600.0}
    path, keys = write_keys(folder / "keys.yaml", a={}, b={}, c={}, slow={"max_running": 4}, poor=budget)
    settings = [f"inference.exit.threshold={THRESHOLD}", "inference.max_batch_size=8"]
    settings += ["serving.bounds.threshold=0.01", "serving.bounds.measures=[max_probability]"]
    settings += [f"serving.keys={path}", f"serving.audit={folder / 'audit'}", "serving.alarms.window=8"]
    running = start_server(checkpoint, *settings)
    yield GuardedServer(running, keys, folder / "audit")
    assert running.end() == 0, "\n".join(running.log)
    assert "Traceback" not in "\n".join(running.log)
