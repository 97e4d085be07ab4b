"""API keys: what the file may say, whose key is whose, and that no key is shown where it shouldn't be."""

import io
import logging
import stat
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megatron_ee.config import ConfigError
from megatron_ee.server.guard import keys
from megatron_ee.server.guard.keys import Client, KeyRing, digest_of, main, new_key

A, B = digest_of("key a"), digest_of("key b")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_whose_key_it_is(tmp_path: Path) -> None:
    more = "layer_tokens: 5000, window: 2, weight: 3, max_running: 4"
    ring = KeyRing.read(write(tmp_path, f"- {{name: a, sha256: {A}}}\n- {{name: b.2, sha256: {B}, {more}}}\n"))
    a, b = ring.clients
    assert (ring.client_of("key a"), ring.client_of("key b")) == (a, b)
    assert a == Client("a", None, 60.0, 1.0, None)
    assert b == Client("b.2", 5000.0, 2.0, 3.0, 4)
    for wrong in (None, "", "key", "key a ", A, "ключ", "\ud800", "x" * 10**6):
        assert ring.client_of(wrong) is None


def test_a_client_may_have_two_keys(tmp_path: Path) -> None:
    ring = KeyRing.read(write(tmp_path, f"- {{name: a, sha256: [{A}, {B}]}}"))
    assert ring.client_of("key a") is ring.client_of("key b") is ring.clients[0]
    assert len(ring.clients) == 1


def test_every_entry_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing({digest_of(str(number)): Client(str(number)) for number in range(7)})
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(keys, "compare_digest", compare)
    for key in ("0", "3", "6", "none"):
        ring.client_of(key)
    assert compared == [(64, 64)] * 28


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", ["1:1: keys: needs a list of clients, one at least"]),
        ("[]", ["1:1: keys: needs a list of clients, one at least"]),
        (f"name: a\nsha256: {A}", ["1:1: keys: needs a list of clients, one at least"]),
        ("- a", ["1:3: client 1: 'a' is not a mapping, but a client is"]),
        ("- {name: a}", ["1:3: client 1 (a): sha256 is required, but missing"]),
        (f"- {{sha256: {A}}}", ["1:3: client 1: name is required, but missing"]),
        (f"- {{name: a, sha256: {A}, max_runing: 2}}", ["client 1 (a).max_runing: unknown key, did you mean"]),
        (f"- {{name: a, sha256: {A}, 3: 2}}", ["client 1 (a).3: unknown key"]),
        (f"- {{name: a, name: b, sha256: {A}}}", ["1:13: 0.name: given twice, first at"]),
        (f"- {{name: a, sha256: {A}}}\n- {{name: a, sha256: {B}}}", ["client 2 (a).name: a is given twice, first"]),
        (
            f"- {{name: a, sha256: {A}}}\n- {{name: b, sha256: {A}}}",
            [f"2:13: client 2 (b).sha256: the hash {A[:8]}... is given twice, first at"],
        ),
        (f"- {{name: a, sha256: [{A}, {A}]}}", [f"client 1 (a).sha256.1: the hash {A[:8]}... is given twice"]),
        ("- {name: a, sha256: []}", ["client 1 (a).sha256: needs one hash at least"]),
        (f"- {{name: a, sha256: {A[:-1]}}}", ["client 1 (a).sha256: must be a key's SHA-256 in 64 small hexadecimal"]),
        (f"- {{name: a, sha256: {A.upper()}}}", ["client 1 (a).sha256: must be a key's SHA-256"]),
        (f"- {{name: 'a b', sha256: {A}}}", ["client 1.name: 'a b' must be letters, digits, '.', '_' or '-'"]),
        (f'- {{name: "a\\n", sha256: {A}}}', [r"client 1.name: 'a\n' must be letters"]),
        (f"- {{name: {'a' * 65}, sha256: {A}}}", ["must be letters, digits"]),
        (f"- {{name: 3, sha256: {A}}}", ["client 1.name: 3 must be letters"]),
        (f"- {{name: anybody, sha256: {A}}}", ["client 1 (anybody).name: anybody is taken by the server itself"]),
        (
            f"- {{name: a, sha256: {A}, layer_tokens: 0, weight: -1, max_running: 0}}",
            [
                "client 1 (a).layer_tokens: 0 must be a positive number",
                "client 1 (a).weight: -1 must be a positive number",
                "client 1 (a).max_running: 0 must be a positive integer",
            ],
        ),
        (f"- {{name: a, sha256: {A}, layer_tokens: true}}", ["layer_tokens: true must be a positive number"]),
        (f"- {{name: a, sha256: {A}, layer_tokens: 1e999}}", ["layer_tokens: inf must be a positive number"]),
        (f"- {{name: a, sha256: {A}, max_running: 1.0}}", ["max_running: 1.0 must be a positive integer"]),
        (f"- {{name: a, sha256: {A}, weight: '2'}}", ["weight: '2' must be a positive number"]),
        (f"- {{name: a, sha256: {A}, window: 3}}", ["(a).window: is of a budget, but layer_tokens is missing"]),
        ("- {name: a, sha256: !!str x}", ["the tag 'tag:yaml.org,2002:str' is not allowed"]),
        ("- [", ["1:4: while parsing a flow node, expected"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_entry_and_place(tmp_path: Path, text: str, messages: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        KeyRing.read(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    for message in messages:
        assert message in str(error.value)
    assert len(lines) == len(messages)


def test_a_key_in_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    key = new_key()
    with pytest.raises(ConfigError) as error:
        KeyRing.read(write(tmp_path, f"- {{name: a, sha256: {key}}}"))
    assert key[3:] not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing.read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        KeyRing.read(tmp_path)
    (tmp_path / "keys.yaml").write_bytes(b"- \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        KeyRing.read(tmp_path / "keys.yaml")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1), (0o620, 1)])
def test_a_file_that_others_may_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: int
) -> None:
    path = write(tmp_path, f"- {{name: a, sha256: {A}}}")
    path.chmod(mode)
    logger = logging.getLogger("megatron_ee")
    logger.addHandler(caplog.handler)  # which others' tests may have cut off from the root
    try:
        KeyRing.read(path)
    finally:
        logger.removeHandler(caplog.handler)
    assert len({record.getMessage() for record in caplog.records}) == warned
    assert stat.S_IMODE(path.stat().st_mode) == mode


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["keys", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main()
    return status, out.getvalue(), err.getvalue()


def test_a_new_key_and_its_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--layer-tokens", "2e6", "--window", "30", "--weight", "2", "--max-running", "3")
    first, second = run_main(monkeypatch, "a", *options), run_main(monkeypatch, "b")
    assert (first[0], second[0]) == (0, 0)
    ring = KeyRing.read(write(tmp_path, first[1] + second[1]))
    key_a, key_b = (printed[2].split()[-1] for printed in (first, second))
    assert key_a.startswith("ee-") and len(key_a) == 46
    assert ring.client_of(key_a) == Client("a", 2e6, 30.0, 2.0, 3)
    assert ring.client_of(key_b) == Client("b")
    assert key_a not in first[1]


@pytest.mark.parametrize("arguments", [("a b",), ("shadow",), ("a", "--window", "3"), ("a", "--layer-tokens", "nan")])
def test_no_entry_that_the_file_would_refuse(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    status, out, err = run_main(monkeypatch, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("a new key: client 1")
