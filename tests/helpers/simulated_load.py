"""Clients as a server sees them: each with its own difficulty, rate and habits, and requests that differ widely."""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from megatron_ee.server.guard.alarms import Alarm, Alarms

HOUR = 3600.0


@dataclass
class SimulatedClient:
    """
    Attributes:
        share: of tokens that leave early, over all its requests.
        steadiness: how alike its requests are: the shares are Beta(share x steadiness, (1 - share) x steadiness).
        rate: requests an hour.
        length: median of its answers.
        full: share of its requests that ask for full depth.
        drafting: share of its requests that draft.
        acceptance: of their drafts.
    """

    name: str
    share: float
    steadiness: float = 5.0
    rate: float = 200.0
    length: float = 80.0
    full: float = 0.0
    drafting: float = 0.0
    acceptance: float = 0.7


def anybodys(name: str, random: np.random.Generator, *, share: float = 0.5) -> SimulatedClient:
    """A client as they come."""
    return SimulatedClient(
        name,
        share=float(random.beta(share * 25, (1 - share) * 25)),
        steadiness=float(random.uniform(2.0, 12.0)),
        rate=float(np.exp(random.normal(np.log(150), 1.0))),
        length=float(np.exp(random.normal(np.log(60), 0.8))),
        full=float(random.choice([0.0, 0.0, 0.2, 1.0])),
        drafting=float(random.choice([0.0, 0.3])),
        acceptance=float(random.beta(14, 6)),
    )


def send(alarms: Alarms, client: SimulatedClient, now: float, random: np.random.Generator) -> None:
    """One request: heavy-tailed in length, its tokens alike."""
    tokens = int(np.clip(np.exp(random.normal(np.log(client.length), 1.2)), 1, 2048))
    asks = random.random()
    drafts = asks > 1 - client.drafting
    drafted = tokens if drafts else 0
    early = random.binomial(tokens, _of_request(client.share, client.steadiness, random))
    alarms.saw(
        client.name,
        early=0 if drafts or asks < client.full else early,
        tokens=tokens,
        drafted=drafted,
        accepted=random.binomial(drafted, _of_request(client.acceptance, client.steadiness, random)),
        now=now,
        compared=None if drafts or asks < client.full else "own",
    )


def serve(
    alarms: Alarms, clients: list[SimulatedClient], hours: float, random: np.random.Generator
) -> list[tuple[float, Alarm]]:
    """Requests of all clients as they arrive, in sessions. Returns each alarm with the time of its beginning."""
    found: dict[tuple[str, str | None, float], tuple[float, Alarm]] = {}
    queue = [(float(random.exponential(HOUR / client.rate)), number) for number, client in enumerate(clients)]
    heapify(queue)
    while queue:
        now, number = heappop(queue)
        if now > hours * HOUR:
            continue
        send(alarms, clients[number], now, random)
        for alarm in alarms.active(now):
            found.setdefault((alarm.kind, alarm.client, alarm.since), (now, alarm))
        pause = float(random.exponential(HOUR / clients[number].rate))
        if random.random() < 1 / 60:  # it goes away for a while
            pause += float(random.exponential(HOUR))
        heappush(queue, (now + pause, number))
    return list(found.values())


def _of_request(share: float, steadiness: float, random: np.random.Generator) -> float:
    share = min(max(share, 1e-3), 1 - 1e-3)
    return float(random.beta(share * steadiness, (1 - share) * steadiness))
