"""All kinds of requests at once: each is answered, refused in words or given up by its client; and the server counts
as its clients do.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from helpers.keys import write_keys
from helpers.servers import RunningServer, start_server
from helpers.soak import TIMEOUT, Tally, run_load

_REFUSED = {"queue_full", "budget_exceeded", "too_large_for_budget", "out_of_bounds", "invalid_api_key"}
_REFUSED |= {"model_not_found", "400"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return write_keys(
        tmp_path_factory.mktemp("keys") / "keys.yaml",
        free={"weight": 2.0},
        limited={"layer_tokens": 4000, "window": 10.0},
        patient={"max_running": 1},
    )


@pytest.fixture
def soaked(checkpoint: Path, keys: tuple[Path, dict[str, str]]) -> Iterator[RunningServer]:
    settings = ["inference.max_batch_size=4", "serving.max_waiting=11", f"serving.timeout={TIMEOUT}"]
    running = start_server(checkpoint, *settings, f"serving.keys={keys[0]}", "serving.shadow=0.1")
    yield running
    running.process.kill()
    running.process.wait()


def _levels(server: RunningServer) -> tuple[int, int, int]:
    process = psutil.Process(server.process.pid)
    return process.memory_info().rss, process.num_fds(), process.num_threads()


class _Counts:
    """What metrics say that has come since."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._before = server.counts()

    def of(self, name: str) -> Counter[str]:
        """By the value of its one label."""
        return Counter({key: now - then for key, (now, then) in self._both(name).items() if now > then})

    def total(self, name: str) -> int:
        return sum(self.of(name).values())

    def _both(self, name: str) -> Mapping[str, tuple[int, int]]:
        now, before = self._server.counts(), self._before
        return {label: (count, before.get((of, label), 0)) for (of, label), count in now.items() if of == name}


def _agree(counts: _Counts, tally: Tally) -> None:
    """The server's counts are its clients', as far as they know."""
    dark, left = tally.num_in_the_dark, tally.left
    tokens, layers = counts.total("generation_tokens_total"), counts.of("exit_tokens_total")
    assert sum(layers.values()) == tokens
    known = sum(tally.layers.values()) + tally.unseen
    drafted, accepted = (counts.total(f"spec_decode_num_{of}_tokens_total") for of in ("draft", "accepted"))
    assert accepted <= drafted
    if dark:
        assert tokens >= known and drafted >= tally.drafted and accepted >= tally.accepted
    else:
        assert (tokens, drafted, accepted) == (known, tally.drafted, tally.accepted)
        seen = {str(layer): count for layer, count in tally.layers.items()}
        assert sum((layers - Counter(seen)).values()) == tally.unseen
    outcomes, refused = counts.of("request_outcomes_total"), counts.of("requests_refused_total")
    # Of several texts, the last one to end gives the answer its outcome; which that was, its client may not know.
    assert 0 <= outcomes["stop"] + outcomes["length"] - tally.completed <= left, (outcomes, tally.outcomes)
    assert 0 <= outcomes["timeout"] - tally.outcomes["timeout"] <= left, (outcomes, tally.outcomes)
    assert not outcomes.keys() - {"stop", "length", "timeout", "cancelled"}
    for code in refused | tally.refused:
        assert 0 <= refused[code] - tally.refused[code] <= left, (code, refused, tally.refused)
    assert outcomes["cancelled"] <= left and "timeout" not in refused
    assert sum((outcomes + refused).values()) <= sum((tally.outcomes + tally.refused).values()) + left


def _load(server: RunningServer, keys: Mapping[str, str], seconds: float, *, leaves: bool, seed: int) -> Tally:
    counts = _Counts(server)
    tally = run_load(server, keys, seconds, leaves=leaves, seed=seed)
    assert not tally.faults, "\n".join(tally.faults[:10])
    server.wait_until_idle()
    _agree(counts, tally)
    return tally


@pytest.mark.parametrize("seconds", [8, pytest.param(180, marks=pytest.mark.slow)])
def test_a_mixed_load(soaked: RunningServer, keys: tuple[Path, dict[str, str]], seconds: int) -> None:
    _, own = keys
    mixed = _load(soaked, own, seconds * 0.7, leaves=True, seed=0)
    levels = _levels(soaked)
    heard = _load(soaked, own, seconds * 0.3, leaves=False, seed=100)
    print(f"{mixed.completed + heard.completed} answers, {mixed.left} left, {mixed.outcomes}, {mixed.refused}")
    assert mixed.completed and heard.completed and mixed.left and mixed.outcomes["timeout"]
    assert set(mixed.refused) == _REFUSED, "not all kinds of refusals, or others: this shows little"
    mixed.add(heard)
    assert max(mixed.asked.values()) > 2, "nobody has asked the same again"
    assert not {question: texts for question, texts in mixed.said.items() if len(texts) > 1}
    memory, files, threads = _levels(soaked)
    assert memory < levels[0] + 40 * 2**20 and files <= levels[1] + 2 and threads <= levels[2] + 2
    assert soaked.end() == 0
    said = "\n".join(soaked.log)
    assert "Traceback" not in said and not any(key in said for key in own.values())
