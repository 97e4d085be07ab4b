"""Orders come to every process as they were given."""

from helpers.ranks import RankPool
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.request import Request
from megatron_ee.server.orders import Abort, Add, Orders, orders_in, orders_out

_REQUESTS = st.builds(
    Request,
    st.lists(st.integers(0, 2**31), min_size=1, max_size=9).map(tuple),
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=3),
        seed=st.none() | st.integers(0, 2**64 - 1),
        stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
    ),
    st.builds(ExitParams, thresholds=st.dictionaries(st.integers(1, 99), st.floats(0, 1), max_size=3)),
    st.lists(st.integers(0, 9), max_size=2).map(tuple),
    st.integers(0, 2**63),
    st.none() | st.integers(0, 20),
)
_ORDERS = st.builds(
    Orders,
    st.lists(
        st.builds(Abort, st.integers(0, 2**40)) | st.builds(Add, st.integers(0, 2**40), _REQUESTS, st.integers(-9, 9)),
        max_size=4,
    ).map(tuple),
    st.booleans(),
)


@given(_ORDERS)
def test_orders_are_the_same_on_the_other_side(orders: Orders) -> None:
    assert orders_in(orders_out(orders)) == orders


def _told(orders: list[Orders]) -> list[Orders]:
    """In a rank: what it is told, in order."""
    import asyncio

    import torch.distributed as dist

    from megatron_ee.server.bridge import Bridge
    from megatron_ee.server.commanders import Following, Leading

    group = dist.new_group(backend="gloo")
    if dist.get_rank():
        following = Following(group)
        return [following.next(is_idle=True) for _ in orders]
    bridge = Bridge(asyncio.new_event_loop(), lambda said: None)
    leading, told = Leading(bridge, group), []
    for each in orders:
        for order in each.orders:
            bridge.give(order)
        if each.stops:
            bridge.stop()
        told.append(leading.next(is_idle=False))
    return told


def test_every_process_is_told_the_same(ranks: RankPool) -> None:
    long = Add(1, Request(tuple(range(5000))))
    orders = [Orders(), Orders((long, Abort(0))), Orders((Abort(1),)), Orders((Add(2, Request((1,))),), stops=True)]
    assert ranks.run(3, _told, orders) == [orders] * 3
