"""Servers of tiny models, in processes of their own as a user starts them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

SETTINGS = (
    "inference.exit.threshold=0.016",
    "inference.sampling.max_new_tokens=16",
    "serving.port=0",
    "serving.bounds.prompt_tokens=2048",
    "serving.bounds.new_tokens=4096",
)
"""A random model is never sure of anything: at this threshold its tokens leave at all of its exits."""


@dataclass
class RunningServer:
    """
    Attributes:
        url: without a slash at its end.
        log: what it has said as yet, line by line.
    """

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def metric(self, name: str, **labels: str) -> float:
        """Of /metrics; the sum over labels that are not named."""
        total = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            found = re.fullmatch(rf"megatron_ee_{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total

    def counts(self) -> dict[tuple[str, str], int]:
        """Of /metrics, all that only grows, by name and the value of its one label, which may be missing."""
        found = re.findall(
            r'^megatron_ee_(\w+_total)(?:\{\w+="(.*)"\})? (\S+)$', httpx.get(f"{self.url}/metrics").text, re.MULTILINE
        )
        return {(name, label): int(float(count)) for name, label, count in found}

    def wait_for(self, text: str, seconds: float = 180.0) -> str:
        """The first line of its log with this text."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.log):
                if text in line:
                    return line
            assert self.process.poll() is None or text in "".join(self.log), "\n".join(self.log)
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in:\n" + "\n".join(self.log))

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Until nothing of any request is left in it."""
        deadline = time.monotonic() + seconds
        while self.metric("num_requests_running") or self.metric("num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are left"
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@dataclass(frozen=True)
class GuardedServer:
    """
    Attributes:
        keys: by client.
        audit: the file.
    """

    server: RunningServer
    keys: dict[str, str]
    audit: Path


def start_server(model: Path, *settings: str, command: Sequence[str] = (), waits: bool = True) -> RunningServer:
    """
    Args:
        command: instead of python -m megatron_ee.server --model MODEL.
        waits: until it is ready.
    """
    whole = [*(command or [sys.executable, "-m", "megatron_ee.server", "--model", str(model)]), *SETTINGS, *settings]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    server = RunningServer(subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=environment))
    threading.Thread(target=_read, args=(server,), daemon=True).start()
    server.url = server.wait_for("listening at").rpartition(" ")[2].strip()
    if waits:
        server.wait_for("ready after")
    return server


def _read(server: RunningServer) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line.rstrip("\n"))
