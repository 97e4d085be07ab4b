"""A server to be measured, and what asks it: plain connections, so that clients take little of the time."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_ee.config.dialect import to_text
from megatron_ee.errors import UserError
from megatron_ee.server.guard.keys import digest_of, new_key

OTHERS = ("first", "second", "third")
FOURTH = "fourth"
"""The client whose prompts are normal ones, or slowdown inputs."""
_MODEL = "bench"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of all rounds the first is dropped.

    Attributes:
        candidates: prompts among which normal ones and slowdown inputs are found, `kept` of each.
        requests: of each client, in a part of a round.
        load: of what the model decodes in a second, what four clients ask for together.
    """

    rounds: int = 6
    new_tokens: int = 64
    prompt_length: int = 32
    batch: int = 8
    candidates: int = 128
    kept: int = 8
    requests: int = 34
    load: float = 0.5


SMALL = Sizes(rounds=3, new_tokens=16, prompt_length=4, batch=4, candidates=16, kept=2, requests=3)


@dataclass(frozen=True, slots=True)
class Server:
    host: str
    port: int
    keys: Mapping[str, str]

    def ask(self, prompt: Sequence[int], new_tokens: int, client: str = OTHERS[0]) -> None:
        """A greedy answer, as a whole."""
        body = json.loads(self._send(prompt, new_tokens, client, stream=False).read())
        assert body["usage"]["completion_tokens"] == new_tokens, body

    def stream(self, prompt: Sequence[int], new_tokens: int, client: str = OTHERS[0]) -> None:
        """The same in pieces, each of which is looked into."""
        tokens = 0
        for line in self._send(prompt, new_tokens, client, stream=True):
            if line.startswith(b"data: {"):
                tokens += len(json.loads(line[6:])["choices"][0]["early_exit"]["tokens"])
        assert tokens == new_tokens, tokens

    def _send(self, prompt: Sequence[int], new_tokens: int, client: str, *, stream: bool) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        body = {"model": _MODEL, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "stream": stream}
        headers = {"Authorization": f"Bearer {self.keys[client]}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(f"the server says {answer.status}: {answer.read().decode()[:300]}")
        return answer


@contextmanager
def served(checkpoint: Path, sizes: Sizes, threshold: float) -> Iterator[Server]:
    """A server with four clients, the last of which may ask for one thing at a time."""
    keys = {name: new_key() for name in (*OTHERS, FOURTH)}
    limits: dict[str, dict[str, Any]] = {FOURTH: {"max_running": 1}}
    entries = [{"name": name, "sha256": digest_of(key), **limits.get(name, {})} for name, key in keys.items()]
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        file = Path(folder) / "keys.yaml"
        file.write_text(to_text(entries))
        file.chmod(0o600)
        settings = [f"serving.keys={file}", f"serving.name={_MODEL}", "serving.port=0", "serving.max_waiting=10000"]
        command = [sys.executable, "-m", "megatron_ee.server", "--model", str(checkpoint), *settings]
        command += [f"serving.bounds.prompt_tokens={sizes.prompt_length}", *shared_settings(sizes, threshold)]
        command += [f"serving.bounds.new_tokens={sizes.new_tokens}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            url = urlsplit(_url_of(process))
            assert url.hostname and url.port
            yield Server(url.hostname, url.port, keys)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def shared_settings(sizes: Sizes, threshold: float) -> list[str]:
    """Of the server, and of the model beside it."""
    most = f"inference.sampling.max_new_tokens={sizes.new_tokens}"
    return ["device=cpu", f"inference.exit.threshold={threshold}", f"inference.max_batch_size={sizes.batch}", most]


def _url_of(process: "subprocess.Popen[str]") -> str:
    """Once it is ready."""
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if "ready after" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()  # it is never to wait for a reader
            return line.split()[-1]
    raise UserError("the server did not start:\n" + "".join(said))


def seconds_of(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started
