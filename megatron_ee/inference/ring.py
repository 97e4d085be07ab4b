"""The stages of a pipeline in different processes: rows that go deeper pass to the next stage, and what exits answer
comes back to all of them.

Every process plans for all stages, by the same numbers in the same order, so that nobody is asked what comes next: who
holds a stage sends what comes of its launches, and the others wait for it where they end in their plans. Sends wait for
nobody. So whatever a process waits for has been sent, or will be by one that does not wait for it: there is no
deadlock.

Shapes: N rows, H hidden size.
"""

import re
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ee.errors import StageLostError
from megatron_ee.inference.answers import Answers
from megatron_ee.inference.facts import ModelFacts
from megatron_ee.inference.flights import Flight
from megatron_ee.inference.luggage import pack, size_of, unpack
from megatron_ee.inference.runner import Runner
from megatron_ee.inference.stages import Stages
from megatron_ee.inference.wire import answers_in, answers_out, decode, encode, work_in, work_out
from megatron_ee.inference.work import Work
from megatron_ee.parallel.mesh import Mesh

_FIRST_BYTES = 1024
"""Of a message; mostly they hold all of it."""
_MOST_UNDER_WAY = 64
"""Messages that are kept for those who have yet to hear them."""
_LENGTH = struct.Struct("<q")
_LAST_WORDS = timedelta(seconds=2)
"""For a stage that has lost another to say so."""


@dataclass(frozen=True)
class Pipeline:
    """
    Attributes:
        facts: of the whole model.
        ring: None where all stages are in this process.
    """

    stages: Stages
    facts: ModelFacts
    ring: "Ring | None" = None


class Ring:
    """
    Args:
        mesh: whose pipeline ranks are the stages.
        timeout: after which a stage that does not answer is lost.

    Raises:
        StageLostError: by all methods: a stage does not answer, which it names; other stages have been told.
    """

    def __init__(self, mesh: Mesh, stages: Stages, *, hidden_size: int, dtype: torch.dtype, timeout: timedelta) -> None:
        assert stages.own is not None
        self._timeout = timeout
        self._stages, self._own, self._ranks = stages, stages.own, mesh.pipeline_ranks
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, mesh.device.torch
        self._states, self._messages = mesh.links.activations, mesh.new_message_group()
        self._under_way: deque[tuple[dist.Work, torch.Tensor, int]] = deque()
        self._given_up: deque[tuple[dist.Work, torch.Tensor, int]] = deque()
        self._told = Work()
        self._early: dict[int, list[dict[str, Any]]] = {stage: [] for stage in self._others}

    def depart(self, flight: Flight, runner: Runner) -> None:
        """Send what has come of a launch on this stage."""
        assert flight.arrival is not None
        crosses, entering = self._crosses(flight), flight.entering
        header, packed = pack(entering, flight.answers) if crosses and flight.tells else ([], None)
        if flight.tells:
            drawn = [[slot, of.draws.num_drawn] for slot, of in entering.items() if not of.draws.is_greedy]
            message = {
                "answers": answers_out(flight.answers),
                "drawn": drawn,
                "work": work_out(runner.work, self._told),
                "luggage": header,
            }
            self._tell_all(message)
        if crosses:
            with self._naming(self._own + 1):
                self._send(flight.arrival.output_NH, self._own + 1, self._states)
                if packed is not None:
                    self._send(packed, self._own + 1, self._states)

    def arrive(self, flight: Flight, runner: Runner) -> tuple[Answers, torch.Tensor | None]:
        """What has come of a launch on whatever stage: answers, and states [N, H] that go on here."""
        stage = self._stages.of(flight.plan.start)
        if stage == self._own:
            assert flight.arrival is not None
            return flight.answers, flight.arrival.output_NH
        answers: Answers = {}
        states_NH, header, entering = None, [], flight.entering
        if flight.tells:
            message = self._hear(stage, "answers")
            answers, header = answers_in(message["answers"]), message["luggage"]
            for slot, count in message["drawn"]:
                entering[slot].draws.skip_to(count)
            work_in(message["work"], runner.work, self._told)
        if self._crosses(flight) and stage + 1 == self._own:
            with self._naming(stage):
                states_NH = self._receive((flight.leg.num_rows, self._hidden_size), self._dtype, stage)
                if header:
                    unpack(header, self._receive((size_of(header),), torch.uint8, stage), entering)
        return answers, states_NH

    def states_of(self, flight: Flight, slots: Sequence[int]) -> torch.Tensor | None:
        """The states of the newest rows of sequences, [N, H], on the launch's stage and all deeper ones."""
        stage = self._stages.of(flight.plan.start)
        if stage == self._own:
            assert flight.arrival is not None
            states_NH = flight.arrival.last_states(slots)
            for deeper in range(stage + 1, self._stages.count):
                with self._naming(deeper):
                    self._send(states_NH, deeper, self._states)
            return states_NH
        if stage > self._own:
            return None
        with self._naming(stage):
            return self._receive((len(slots), self._hidden_size), self._dtype, stage)

    def agree(self, holds: bool) -> bool:
        """Whether something holds in all stages; all have to ask."""
        self._tell_all({"holds": holds})
        return all([holds, *(self._hear(stage, "holds")["holds"] for stage in self._others)])

    def settle(self) -> None:
        """Wait until all stages have heard everything: then a process may end, and others may see that it has."""
        self.agree(True)
        for stage in self._others:
            with suppress(RuntimeError):
                self._tell({"settled": True}, stage)
        for stage in self._others:
            with suppress(RuntimeError):
                self._next_message(stage)

    def _crosses(self, flight: Flight) -> bool:
        """Whether its rows come to the next stage."""
        return flight.plan.stop in self._stages.borders

    @property
    def _others(self) -> list[int]:
        return [stage for stage in range(self._stages.count) if stage != self._own]

    def _tell_all(self, message: Mapping[str, Any]) -> None:
        for stage in self._others:
            with self._naming(stage):
                self._tell(message, stage)

    def _tell(self, message: Mapping[str, Any], stage: int) -> None:
        """Its length goes in front."""
        data = encode(message)
        whole = torch.frombuffer(bytearray(_LENGTH.pack(len(data)) + data), dtype=torch.uint8)
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        first[: len(whole)] = whole[:_FIRST_BYTES]
        self._send(first, stage, self._messages)
        if len(whole) > _FIRST_BYTES:
            self._send(whole[_FIRST_BYTES:], stage, self._messages)

    def _hear(self, stage: int, kind: str) -> dict[str, Any]:
        """The next message of a kind. One that asks may come before what is told of a launch that is still under way in
        this process's plans."""
        early = self._early[stage]
        found = next((message for message in early if kind in message), None)
        if found is not None:
            early.remove(found)
            return found
        while True:
            with self._naming(stage):
                message = self._next_message(stage)
            if "lost" in message:
                raise StageLostError(message["lost"])
            if kind in message:
                return message
            early.append(message)

    def _next_message(self, stage: int, timeout: timedelta | None = None) -> dict[str, Any]:
        first = self._take(torch.empty(_FIRST_BYTES, dtype=torch.uint8), stage, self._messages, timeout)
        (length,) = _LENGTH.unpack_from(first.numpy().tobytes())
        data = first
        if (more := length + _LENGTH.size - _FIRST_BYTES) > 0:
            rest = self._take(torch.empty(more, dtype=torch.uint8), stage, self._messages, timeout)
            data = torch.cat([first, rest])
        return decode(data.numpy().tobytes()[_LENGTH.size : _LENGTH.size + length])

    def _send(self, tensor: torch.Tensor, stage: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self._ranks[stage], group=group)
        assert work is not None, "both ends are in the group"
        self._under_way.append((work, tensor, stage))
        while len(self._under_way) > _MOST_UNDER_WAY:  # gloo knows of none that it has arrived before somebody waits
            self._arrived(*self._under_way.popleft())

    def _arrived(self, work: dist.Work, tensor: torch.Tensor, stage: int) -> None:
        """A message that a stage has yet to hear makes this one wait; whoever is behind all others never waits."""
        with self._naming(stage):
            if tensor.is_cuda:
                work.wait()
            else:
                work.wait(self._timeout)

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> torch.Tensor:
        return self._take(torch.empty(shape, dtype=dtype, device=self._device), stage, self._states)

    def _take(
        self, tensor: torch.Tensor, stage: int, group: dist.ProcessGroup, timeout: timedelta | None = None
    ) -> torch.Tensor:
        work = dist.irecv(tensor, src=self._ranks[stage], group=group)
        assert work is not None, "both ends are in the group"
        if tensor.is_cuda:
            work.wait()  # its stream waits, and not the host: NCCL has a time-out of its own
        else:
            work.wait(timeout or self._timeout)
        return tensor

    @contextmanager
    def _naming(self, stage: int) -> Iterator[None]:
        """Whom it is about when messages fail: this stage, or the one that it has lost itself, as it says then."""
        try:
            yield
        except RuntimeError as error:
            reason = f"stage {stage} (rank {self._ranks[stage]}) does not answer: {_reason(error)}"
            lost = self._last_words(stage) or reason
            self._pass_on(lost)
            raise StageLostError(lost) from error

    def _last_words(self, stage: int) -> str | None:
        with suppress(RuntimeError):
            while "lost" not in (message := self._next_message(stage, _LAST_WORDS)):
                pass
            return str(message["lost"])
        return None

    def _pass_on(self, lost: str) -> None:
        """To all that are there."""
        self._given_up, self._under_way = self._under_way, deque()  # gloo waits for what is let go of
        for stage in self._others:
            with suppress(RuntimeError):
                self._tell({"lost": lost}, stage)
        deadline = time.monotonic() + _LAST_WORDS.total_seconds()
        for work, _, _ in self._under_way:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))


def _reason(error: RuntimeError) -> str:
    """Of what gloo says, the first sentence, without the place in its source."""
    first_line = re.sub(r"^\[[^]]*\]\s*", "", str(error).splitlines()[0])
    return first_line.partition(". ")[0]
