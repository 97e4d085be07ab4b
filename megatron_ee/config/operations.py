"""The section `checkpoint`: what a run leaves behind to go on from."""

from pydantic import Field

from megatron_ee.config.fields import NonNegativeInt, Section


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and whether a run continues from one."""

    interval: NonNegativeInt = Field(0, description="iterations between checkpoints; 0: only at the end")
    asynchronous: bool = Field(
        True, description="write while training goes on, from a copy in host memory; false: training waits"
    )
    resume: bool = Field(True, description="continue from the run's newest checkpoint when there is one")
    verify: bool = Field(
        True,
        description="before loading, read all files and compare them with what was saved; damaged: take the one before",
    )
    keep_last: NonNegativeInt = Field(0, description="keep this many of the newest checkpoints; 0: all")
    keep_every: NonNegativeInt = Field(
        0, description="beside those, keep the ones of iterations that are multiples of this; 0: none"
    )
