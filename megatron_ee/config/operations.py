"""The sections `checkpoint` and `faults`: what a run leaves behind to go on from, and what ends or alarms it."""

from pydantic import Field

from megatron_ee.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and whether a run continues from one."""

    initial: str | None = Field(
        None,
        description="a run or step folder whose parameters the run begins with, at iteration 0 and without optimizer "
        "state; default: none, the parameters are random",
    )
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


class FaultsConfig(Section):
    """What is done about ranks that hang, die or are slow, and about losses that are no numbers or leap."""

    hang_timeout: NonNegativeFloat = Field(
        600.0,
        description="seconds that a rank may spend on one thing (an action, a save) before the job ends; 0: any time",
    )
    heartbeat_interval: PositiveFloat = Field(10.0, description="seconds between two writings of heartbeat.json")
    max_nonfinite: PositiveInt = Field(
        5, description="steps in a row, all skipped, whose gradients are no numbers; after these training ends"
    )
    spike_deviations: NonNegativeFloat = Field(
        10.0, description="alarm when the deepest exit's loss is so many deviations above its median of late; 0: none"
    )
    spike_window: PositiveInt = Field(100, description="steps that are of late")
    straggler_ratio: NonNegativeFloat = Field(
        1.5, description="name a rank that takes so many times the median of those with the same work; 0: none"
    )
