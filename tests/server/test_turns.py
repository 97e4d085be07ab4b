"""Whose turn it is, without a model: what clients ask for, and an engine that says what a test wants."""

import asyncio
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from helpers.loops import run
from helpers.tiny import tiny_config

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.request import Emission, Request
from megatron_ee.server.guard.audit import AuditLog
from megatron_ee.server.guard.keys import Client
from megatron_ee.server.offered import Offered
from megatron_ee.server.orders import Add
from megatron_ee.server.service import Service
from megatron_ee.server.watchers import Watcher
from megatron_ee.tokenizer import ByteTokenizer


def _offered() -> Offered:
    config = tiny_config()
    of = SimpleNamespace(config=config, num_layers=8, exits=(2, 5), positions=1000, exit=config.inference.exit)
    of.tokenizer = ByteTokenizer()
    return cast(Offered, of)


def _in_loop(work: Callable[[Service], Any]) -> Any:
    async def in_loop() -> Any:
        service = Service(asyncio.get_running_loop(), Watcher(AuditLog(None)))
        service.open(_offered(), slots=1)
        return work(service)

    return run(in_loop())


def test_turns_go_by_what_was_used_not_by_what_was_asked_for() -> None:
    """Answers of both end after a token, but one client always asks for 400."""

    def serve(service: Service) -> Counter[str]:
        clients: dict[int, str] = {}
        for number in range(20):
            name, new_tokens = (("modest", 4), ("greedy", 400))[number % 2]
            request = Request((number,), SamplingParams(max_new_tokens=new_tokens), ExitParams())
            service.submit(str(number), Client(name), [request])
            clients[number] = name
        served: Counter[str] = Counter()
        for _ in range(10):
            (order,) = service.bridge.take(0.0).orders
            assert isinstance(order, Add)
            served[clients[order.request.prompt[0]]] += 1
            service.hear([(order.number, Emission(65, 2, 0.9, finish="stop"))])
        return served

    assert _in_loop(serve) == {"modest": 5, "greedy": 5}
