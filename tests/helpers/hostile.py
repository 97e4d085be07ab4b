"""Requests that nobody should send: generated from what a server says of itself, and written by hand."""

import json
import random
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx

MODEL = "tiny"
FIELDS = (
    *("prompt", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids"),
    *("ignore_eos", "logprobs", "echo", "user", "early_exit", "messages", "model", "unheard_of"),
)
EXIT_FIELDS = (
    *("mode", "measure", "threshold", "thresholds", "min_exit", "exits", "patience", "kv_policy", "max_pending"),
    *("draft_exit", "draft_length", "draft_threshold", "sled", "dola", "unheard_of"),
)
# As JSON texts: some are values that no JSON library writes.
VALUES = (
    *("null", "true", "0", "-1", "1", "2", "1e-300", "1e308", "1e400", "-1e400", "NaN", "Infinity", "-Infinity"),
    *("9223372036854775808", "1" + "0" * 40, "1" * 5000, '""', '"\\u0000"', '"\\ud800"', '"1"', '"x" ', "[]", "[[]]"),
    *("[0]", "[-1]", "[257]", "[1000000]", "[true]", "[1.5]", '["", ""]', '["a", 1]', "{}", '{"a": 1}', '{"0": 1e308}'),
    *('{"-1": 1}', '{"layers": [2, 2]}', '{"steps": 1000000000}', '{"alpha": 1e308}', '{"top_k": 1000000000}'),
    *("[" * 2000 + "]" * 2000, '"' + "a" * 40_000 + '"', "[" + "1," * 5000 + "1]"),
)
_ROUTES = ("/v1/completions", "/v1/chat/completions")


def bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Routes and bodies: a request that would do, with one or two of its fields replaced."""
    draw = random.Random(seed)
    for _ in range(count):
        route = draw.choice(_ROUTES)
        fields = {"model": json.dumps(MODEL), "max_tokens": "3"}
        fields |= {"prompt": '"x"'} if route == _ROUTES[0] else {"messages": '[{"role": "user", "content": "x"}]'}
        for _ in range(draw.choice((1, 1, 2))):
            if draw.random() < 0.4:
                fields["early_exit"] = f'{{"{draw.choice(EXIT_FIELDS)}": {draw.choice(VALUES)}}}'
            else:
                fields[draw.choice(FIELDS)] = draw.choice(VALUES)
        yield route, ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


def post(url: str, body: bytes, kind: str = "application/json") -> httpx.Response:
    return httpx.post(url, content=body, headers={"Content-Type": kind}, timeout=60)


def odd_requests(url: str) -> Iterator[httpx.Response]:
    """By hand: no JSON, other methods, other paths."""
    target = f"{url}{_ROUTES[0]}"
    for body in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}" * 2, b"\x00" * 100, b'{"model": "tiny"}'):
        yield post(target, body)
    good = b'{"model": "tiny", "prompt": "x", "max_tokens": 2}'
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\u00e9".encode().hex()):
        yield post(target, good, kind)
    yield post(target, b'{"model": "tiny", "prompt": "' + b"a" * 10_000_000 + b'"}')
    yield post(target, json.dumps({"model": MODEL, "prompt": "a" * 200_000}).encode())
    yield post(target, json.dumps({"model": MODEL, "prompt": [1] * 200_000}).encode())
    yield post(target, json.dumps({"model": MODEL, "prompt": [[1]] * 200_000}).encode())
    yield post(target, json.dumps({"model": MODEL, "prompt": "x", "stop": ["a" * 1000] * 500}).encode())
    yield post(
        target, json.dumps({"model": MODEL, "prompt": "x", "logit_bias": dict.fromkeys(range(50_000), 1)}).encode()
    )
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "WEIRD"):
        yield httpx.request(method, target)
    for path in (
        "/v1/models/%00",
        "/v1/models/..%2f..",
        "/..%2f..%2fetc%2fpasswd",
        "/page/../app.py",
        "/%ff",
        "/a" * 4000,
    ):
        yield httpx.get(url + path)
    yield httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer " + "x" * 8000})


class RawClient:
    """A connection that says what it likes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=60)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_status(self) -> int | None:
        """Of the answer; None: the connection was closed without one."""
        data = b""
        while b"\r\n" not in data:
            if not (more := self._socket.recv(4096)):
                return None
            data += more
        return int(data.split()[1])

    def close(self) -> None:
        self._socket.close()


def head_of(length: int, route: str = _ROUTES[0]) -> bytes:
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()


def leaving(url: str, seed: int) -> None:
    """A client that asks for a long answer and goes away, at some moment of it."""
    draw = random.Random(seed)
    body = json.dumps(
        {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": draw.random() < 0.7, "n": 2}
    ).encode()
    client = RawClient(url)
    whole = head_of(len(body)) + body
    match draw.randrange(4):
        case 0:
            client.send(whole[: draw.randrange(1, len(whole))])
        case 1:
            client.send(whole)
        case 2:
            client.send(whole)
            if b'"stream": true' in body:
                client.read_status()
        case 3:
            for start in range(0, len(whole), 60):
                client.send(whole[start : start + 60])
    client.close()


Check = Callable[[httpx.Response], None]


def check_answer(answer: httpx.Response) -> None:
    """Never a fault of the server's; and an error is one that clients understand."""
    said = f"{answer.request.method} {answer.request.url} {answer.request.content[:300]!r}"
    assert answer.status_code < 500, f"{answer.status_code} {answer.text[:300]} to {said}"
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        assert error["message"] and error["type"], said
        assert "Traceback" not in answer.text and ".py" not in error["message"], said
