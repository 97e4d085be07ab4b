"""Runs a training step by megatron-core's own pipeline schedules: 1F1B, or interleaved where a stage has chunks.

They know forwards and backwards only. So an exit's loss is attached to its hidden state: when the backward arrives
there, it runs the exit and goes on with the sum of both gradients. Nothing of an exit is kept in between, and none of
its work is hidden in waits: an oracle for our own runtime, and the way to megatron-core's overlaps on large clusters.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ee.parallel.mesh import Mesh
from megatron_ee.parallel.p2p import MessageSpec
from megatron_ee.parallel.pipeline.plan import Action, Kind, Plan
from megatron_ee.parallel.pipeline.runtime import ActionWatch


class AttachedProgram(Protocol):
    """What the schedule computes; see `StageStep`."""

    def forward_with_exits(self, action: Action, received: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [S, B, H] with exits attached, and the final exit's loss, zero on other stages."""
        ...


class MegatronRuntime:
    """A `Runtime` for plans of megatron-core's order: it takes from them how many micro-batches there are.

    Args:
        config: the stage's.
        no_sync: see `StageStep`.
    """

    def __init__(
        self,
        mesh: Mesh,
        message: MessageSpec,
        config: TransformerConfig,
        *,
        num_chunks: int,
        no_sync: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._mesh, self._message = mesh, message
        self._config = _pipeline_config(config, mesh, message, num_chunks, no_sync)
        self._chunks: list[torch.nn.Module] = [_Chunk(self._config, number) for number in range(num_chunks)]
        self._run = get_forward_backward_func(mesh.pipeline_size, num_chunks if num_chunks > 1 else None)
        self._communicator = P2PCommunicator(mesh.groups.pp, self._config)

    def run(self, plan: Plan, program: AttachedProgram, *, watches: Sequence[ActionWatch] = ()) -> None:
        """Run all micro-batches forward and backward. Of the actions, `watches` see each F."""
        assert not plan.fills, "megatron-core's schedules have no fills"

        def step(microbatches: Iterator[int], chunk: "_Chunk") -> tuple[torch.Tensor, Callable[..., Any]]:
            action = Action(Kind.F, self._mesh.pipeline_rank, chunk.number, next(microbatches))
            for watch in watches:
                watch.begin(action)
            output_SBH, loss = program.forward_with_exits(action, chunk.received)
            for watch in watches:
                watch.end(action)
            no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)  # losses are normalised already
            return output_SBH, lambda output: (loss, no_tokens, {})

        more = {"p2p_communicator": self._communicator} if self._mesh.pipeline_size > 1 else {}
        self._run(
            forward_step_func=step,
            data_iterator=[iter(range(plan.num_regular)) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=plan.num_regular,
            seq_length=self._message.shape[0] * (self._mesh.tensor_size if self._config.sequence_parallel else 1),
            micro_batch_size=self._message.shape[1],
            forward_only=False,
            pg_collection=self._mesh.groups,
            **more,
        )


class _Chunk(torch.nn.Module):
    """What megatron-core takes for a model: it hands over what was received."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.received,) = tensors


def _pipeline_config(
    config: TransformerConfig,
    mesh: Mesh,
    message: MessageSpec,
    num_chunks: int,
    no_sync: Callable[[], AbstractContextManager[None]],
) -> TransformerConfig:
    """The layers' config knows of no pipeline (see `transformer_config`); the schedules' copy does."""
    changed = copy.copy(config)
    changed.pipeline_model_parallel_size = mesh.pipeline_size
    changed.virtual_pipeline_model_parallel_size = num_chunks if num_chunks > 1 else None
    changed.microbatch_group_size_per_vp_stage = mesh.pipeline_size
    changed.pipeline_dtype = message.dtype
    changed.no_sync_func = no_sync
    # An exit at the end of a stage reads the output after it was sent; and megatron-core 0.16.1 frees outputs under
    # way where its interleaved schedule overlaps: wrong gradients.
    changed.deallocate_pipeline_outputs = False
    # The interleaved schedule with batched messages crosses them where there are two stages.
    changed.overlap_p2p_comm = num_chunks > 1
    changed.batch_p2p_comm = num_chunks == 1
    return changed
