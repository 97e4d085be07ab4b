"""What the engine is told between two steps: the same in every process that holds a part of the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ee.config import ExitParams, SamplingParams
from megatron_ee.inference.request import Request


@dataclass(frozen=True, slots=True)
class Add:
    """
    Attributes:
        number: by which it is spoken of.
        priority: those with a lower one are served first.
    """

    number: int
    request: Request
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Abort:
    number: int


@dataclass(frozen=True, slots=True)
class Orders:
    """In the order in which they were given.

    Attributes:
        stops: it is over, with all that is under way.
    """

    orders: tuple[Add | Abort, ...] = ()
    stops: bool = False


def orders_out(orders: Orders) -> bytes:
    """As JSON, for other processes."""
    return json.dumps({"orders": [_out(order) for order in orders.orders], "stops": orders.stops}).encode()


def orders_in(data: bytes) -> Orders:
    message = json.loads(data)
    return Orders(tuple(_in(order) for order in message["orders"]), message["stops"])


def _out(order: Add | Abort) -> dict[str, Any]:
    if isinstance(order, Abort):
        return {"abort": order.number}
    request = order.request
    return {
        "add": order.number,
        "priority": order.priority,
        "prompt": request.prompt,
        "sampling": request.sampling.model_dump_json(),
        "exit": request.exit.model_dump_json(),
        "stop_token_ids": request.stop_token_ids,
        "seed": request.seed,
        "prompt_logprobs": request.prompt_logprobs,
    }


def _in(order: Mapping[str, Any]) -> Add | Abort:
    if "abort" in order:
        return Abort(order["abort"])
    request = Request(
        tuple(order["prompt"]),
        SamplingParams.model_validate_json(order["sampling"]),
        ExitParams.model_validate_json(order["exit"]),
        tuple(order["stop_token_ids"]),
        order["seed"],
        order["prompt_logprobs"],
    )
    return Add(order["add"], request, order["priority"])
