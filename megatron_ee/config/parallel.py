"""The section `parallel`: how a model is split."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ee.config.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, list_as_tuple


class StagePlacement(Section):
    """One stage, or one chunk of it, of a hand-pinned layout. An exit on a border belongs to one of the two sides."""

    layers: NonNegativeInt = Field(
        description="0: nothing is for the stage to do; of the last stages, where training.trains is exits"
    )
    exits_at_start: bool = Field(False, description="own the exit on the left border")
    exits_at_end: bool = Field(True, description="own the exit on the right border")


class ParallelConfig(Section):
    """How the model is split over processes and in which order a step's micro-batches run."""

    tensor: PositiveInt = Field(1, description="ranks that share each matrix")
    sequence: bool = Field(False, description="between matrices, tensor-parallel ranks share the positions too")
    pipeline: PositiveInt = Field(1, description="stages")
    chunks: PositiveInt = Field(1, description="pieces of the model on each stage; above 1 for schedule interleaved")
    data: PositiveInt | Literal["auto"] = Field("auto", description="auto: world size / (tensor x pipeline)")
    schedule: str = Field(
        "1f1b",
        description="1f1b, gpipe, interleaved, filled-1f1b (extra micro-batches in idle time), zero-bubble (1f1b whose "
        "gradients of weights come later), megatron (megatron-core's own 1f1b or interleaved), or a plug-in's",
    )
    layout: Literal["auto"] | Annotated[tuple[StagePlacement, ...], BeforeValidator(list_as_tuple)] = Field(
        "auto",
        description="auto: the slowest stage as fast as can be; or a list, one entry a stage, those of every stage's "
        "first chunk before those of the second",
    )
    costs: str = Field(
        "estimated",
        description="durations of layers and exits, for layouts and fills: estimated from their products, or the file "
        "that tools/measure_costs.py wrote",
    )
    fill_tolerance: NonNegativeFloat = Field(
        0.0, description="filled-1f1b: the share of its length by which fills may lengthen a step"
    )
    overlap_grad_reduce: bool = Field(False, description="sum gradients over data ranks while others are computed")
    distributed_optimizer: bool = Field(False, description="data ranks share the optimizer's state (ZeRO stage 1)")

    @property
    def goes_in_rounds(self) -> bool:
        """Whether micro-batches go through the stages' chunks in groups of as many as there are stages."""
        return self.schedule == "interleaved" or (self.schedule == "megatron" and self.chunks > 1)
