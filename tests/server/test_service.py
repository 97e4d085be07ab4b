"""Who waits, who is served, and what comes of it: without an engine, whose part the tests play."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from helpers.loops import run
from helpers.tiny import tiny_config

from megatron_ee.config import SamplingParams
from megatron_ee.inference.asking import Asking as Prompts
from megatron_ee.inference.request import Emission, Failure, FinishReason, Request
from megatron_ee.server.guard.audit import AuditLog
from megatron_ee.server.guard.keys import Client
from megatron_ee.server.offered import Offered
from megatron_ee.server.orders import Abort, Add
from megatron_ee.server.protocol.errors import ApiError
from megatron_ee.server.service import Service
from megatron_ee.server.tickets import Asking
from megatron_ee.server.watchers import Watcher
from megatron_ee.tokenizer.byte import ByteTokenizer

ANN, BEN = Client("ann"), Client("ben")


class Desk:
    """A service, and the engine's part."""

    def __init__(self, slots: int = 2, **serving: Any) -> None:
        config = tiny_config(serving=serving)
        offered = Offered("tiny", config, 8, (2, 5), Prompts(config, ByteTokenizer()), None, 99, lambda _: None, ())
        self.service = Service(asyncio.get_running_loop(), Watcher(AuditLog(None)))
        self.service.open(offered, slots=slots)

    def ask(self, client: Client = ANN, count: int = 1, **sampling: Any) -> Asking:
        requests = [Request((1, 2), SamplingParams(**sampling))] * count
        return self.service.submit("x", client, requests)

    def ordered(self) -> list[str]:
        """What the engine has been told since: +2 for a text that it gets, -2 for one that it is to forget."""
        orders = self.service.bridge.take(0.0).orders
        return [f"+{order.number}" if isinstance(order, Add) else f"-{order.number}" for order in orders]

    def say(self, number: int, text: str = "a", finish: FinishReason | None = None) -> None:
        self.service.hear([(number, Emission(ord(text), 5, 0.9, finish=finish))])


def desk_test(work: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """In an event loop of its own."""

    def test() -> None:
        run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]

    test.__name__, test.__doc__ = work.__name__, work.__doc__
    return test


async def _whole(asking: Asking) -> list[str]:
    texts = [""] * len(asking.tickets)
    async for index, said in asking.answers():
        texts[index] += said.text  # type: ignore[union-attr]
    return texts


@desk_test
async def test_texts_come_to_whoever_asked() -> None:
    desk = Desk()
    first, second = desk.ask(count=1), desk.ask(BEN, 1)
    assert desk.ordered() == ["+1", "+2"]
    for number, text in ((1, "h"), (2, "y"), (1, "i")):
        desk.say(number, text, "length" if text != "h" else None)
    assert (await _whole(first), await _whole(second)) == (["hi"], ["y"])
    assert not desk.service.num_running


@desk_test
async def test_a_stop_string_is_told_to_the_engine() -> None:
    desk = Desk()
    asking = desk.ask(stop=("i",))
    desk.say(1, "h")
    desk.say(1, "i")
    assert await _whole(asking) == ["h"]
    assert desk.ordered() == ["+1", "-1"]


@desk_test
async def test_too_many_that_wait_are_sent_away() -> None:
    desk = Desk(slots=1, max_waiting=2)
    desk.ask(count=3)
    with pytest.raises(ApiError) as refused:
        desk.ask(BEN)
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert int(refused.value.headers["Retry-After"]) >= 1
    desk.say(1, finish="length")
    desk.ask(BEN)
    assert desk.service.num_waiting == 2


@desk_test
async def test_clients_take_turns() -> None:
    desk = Desk(slots=1)
    ann, ben = desk.ask(ANN, 3), desk.ask(BEN, 1)
    for number in (1, 2, 3, 4):
        desk.say(number, finish="length")
    assert [ticket.number for ticket in ben.tickets] == [2]
    assert [ticket.number for ticket in ann.tickets] == [1, 3, 4]


@desk_test
async def test_who_leaves_is_forgotten_wherever_it_is() -> None:
    desk = Desk(slots=1)
    running, waiting, last = desk.ask(), desk.ask(), desk.ask()
    assert desk.ordered() == ["+1"]
    desk.service.leave(waiting)
    assert (desk.ordered(), desk.service.num_waiting) == ([], 1)
    desk.service.leave(running)
    desk.service.leave(running)
    assert desk.ordered() == ["-1", "+2"]
    desk.say(1, finish="length")  # was on its way already
    desk.say(2, finish="length")
    assert await _whole(last) == ["a"]


@desk_test
async def test_what_takes_too_long_fails_and_makes_room() -> None:
    desk = Desk(slots=1, timeout=0.02)
    slow, waiting = desk.ask(), desk.ask()
    for asking in (slow, waiting):
        with pytest.raises(ApiError) as failed:
            await _whole(asking)
        assert (failed.value.status, failed.value.code) == (503, "timeout")
    assert (desk.service.num_running, desk.service.num_waiting) == (0, 0)
    assert [order for order in desk.ordered() if order.startswith("-")]


@desk_test
async def test_one_text_that_fails_ends_the_whole_answer() -> None:
    desk = Desk()
    asking = desk.ask(count=2)
    desk.service.hear([(2, Failure("no token can be chosen"))])
    with pytest.raises(ApiError, match="no token") as failed:
        await _whole(asking)
    assert failed.value.status == 400
    assert "-1" in desk.ordered() and not desk.service.num_running


@desk_test
async def test_the_last_answer_ends_a_drain() -> None:
    desk, drained = Desk(slots=1), []
    first, second = desk.ask(), desk.ask()
    desk.service.drain(60, lambda: drained.append(True))
    with pytest.raises(ApiError) as refused:
        desk.ask()
    assert (refused.value.status, refused.value.code) == (503, "shutting_down")
    desk.say(1, finish="length")
    assert not drained
    desk.say(2, finish="length")
    assert drained and (await _whole(first), await _whole(second)) == (["a"], ["a"])


@desk_test
async def test_a_drain_ends_when_its_time_is_over() -> None:
    desk, drained = Desk(slots=1), asyncio.Event()
    asking = desk.ask()
    desk.service.drain(60, drained.set)
    desk.service.drain(0.01, drained.set)
    await drained.wait()
    with pytest.raises(ApiError) as ended:
        await _whole(asking)
    assert ended.value.code == "shutting_down"
    assert Abort(1) in desk.service.bridge.take(0.0).orders


@desk_test
async def test_an_engine_that_is_lost_fails_all() -> None:
    desk = Desk(slots=1)
    askings = [desk.ask(), desk.ask()]
    desk.service.end("a stage is lost")
    for asking in askings:
        with pytest.raises(ApiError, match="a stage is lost"):
            await _whole(asking)
    with pytest.raises(ApiError):
        desk.ask()
