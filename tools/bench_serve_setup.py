"""What the measures of serving share: sizes, and the requests of every round."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from megatron_ee.config import ExitParams, KvPolicy, SamplingParams, SchedulingParams
from megatron_ee.inference.request import Request
from megatron_ee.inference.scheduling.mixed_prompts import MixedPrompt, mixed_prompts
from megatron_ee.inference.scheduling.planner import Planner
from megatron_ee.inference.scheduling.strategies.named import make_planner
from megatron_ee.inference.scheduling.workload import Lengths

if TYPE_CHECKING:  # what imports megatron-core has to wait until the device is chosen
    from megatron_ee.inference.opened import OpenedModel

POLICIES: tuple[KvPolicy, ...] = ("recompute", "fill", "propagate")
STRATEGIES = ("lockstep", "compaction", "rebatch")


@dataclass(frozen=True, slots=True)
class ServeSizes:
    """One load.

    Attributes:
        residents: sequences at a time.
        requests: of a round.
        rounds: the first one is dropped.
        load: of the room that lockstep has, which requests take that come one by one; None: all come at once.
        threshold: of the largest probability.
        alone: requests of the first round that are decoded alone too.
    """

    residents: int
    requests: int
    rounds: int
    load: float | None = None
    launch_rows: int = 16
    prefill_chunk: int = 512
    threshold: float = 0.4
    alone: int = 0
    characters: Lengths = Lengths(50, most=120)
    short: Lengths = Lengths(8, most=16)
    long: Lengths = Lengths(32, most=64)

    @property
    def name(self) -> str:
        return f"r{self.residents}" if self.load is None else f"r{self.residents}_poisson"


def suite() -> list[ServeSizes]:
    """Minutes."""
    return [
        ServeSizes(16, requests=40, rounds=7, alone=24),
        ServeSizes(64, requests=128, rounds=4),
        ServeSizes(16, requests=40, rounds=2, load=0.7),
    ]


def small_suite() -> list[ServeSizes]:
    """Seconds, and no figures."""
    few = Lengths(8, most=12)

    def small(residents: int, load: float | None = None, alone: int = 0) -> ServeSizes:
        return ServeSizes(residents, 8, 2, load, 2, 16, 0.02, alone, few, Lengths(2, most=3), Lengths(5, most=8))

    return [small(2, alone=3), small(6), small(2, load=0.7)]


class Setting(NamedTuple):
    """
    Attributes:
        policy: for missing keys and values; None: full depth, where none are missing.
    """

    strategy: str
    policy: KvPolicy | None

    @property
    def name(self) -> str:
        return f"{self.strategy}_{self.policy or 'full'}"

    @property
    def exit(self) -> dict[str, object]:
        return {"mode": "full"} if self.policy is None else {"kv_policy": self.policy}


FULL = Setting("compaction", None)


def settings_of_a_round() -> list[Setting]:
    """In the order of a round: full depth, and for each policy lockstep, the others, and lockstep again."""
    return [FULL, *(Setting(name, policy) for policy in POLICIES for name in (*STRATEGIES, "lockstep"))]


@dataclass(frozen=True)
class Load:
    """Requests of all rounds, other ones in each, all of which fit into `capacity` positions."""

    model: "OpenedModel"
    sizes: ServeSizes

    @cached_property
    def prompts(self) -> list[list[tuple[MixedPrompt, tuple[int, ...]]]]:
        sizes = self.sizes
        drawn = mixed_prompts(
            sizes.requests * sizes.rounds,
            seed=sizes.residents,
            characters=sizes.characters,
            short=sizes.short,
            long=sizes.long,
        )
        encoded = [(of, tuple(self.model.tokenizer.encode(of.prompt)[: sizes.characters.most])) for of in drawn]
        return [encoded[start : start + sizes.requests] for start in range(0, len(encoded), sizes.requests)]

    @property
    def capacity(self) -> int:
        return max(len(tokens) + of.new_tokens for round_of in self.prompts for of, tokens in round_of)

    def requests(self, number: int, setting: Setting) -> list[Request]:
        """Greedy, past the ends of documents."""
        params = ExitParams.model_validate({"threshold": self.sizes.threshold, **setting.exit})
        return [
            Request(tokens, SamplingParams(max_new_tokens=of.new_tokens, ignore_eos=True), params)
            for of, tokens in self.prompts[number]
        ]

    def planner(self, strategy: str) -> Planner:
        sizes = self.sizes
        params = SchedulingParams.model_validate({"strategy": strategy, "launch_rows": sizes.launch_rows})
        costs, depths = self.model.launch_costs, self.model.depths
        return make_planner(params, costs, depths, residents=sizes.residents, prefill_chunk=sizes.prefill_chunk)
