"""The sections `checkpoint` and `faults`: what a run of weeks needs."""

from pydantic import Field

from megatron_ee.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and whether a run continues from one."""

    interval: NonNegativeInt = Field(0, description="iterations between checkpoints; 0: only at the end")
    resume: bool = Field(True, description="continue from the run's newest checkpoint when there is one")
    asynchronous: bool = Field(True, description="write while training goes on; false: wait until it is on the disk")
    verify: bool = Field(
        True, description="on resuming, read every file once more and compare its digest; a damaged one is passed over"
    )
    keep_last: NonNegativeInt = Field(0, description="keep this many of the newest checkpoints; 0: all")
    keep_every: NonNegativeInt = Field(
        0, description="beside those, keep the ones of iterations that are multiples of this; 0: none"
    )


class FaultsConfig(Section):
    """What a run does when something goes wrong."""

    hang_timeout: PositiveFloat = Field(
        600.0, description="seconds without any progress after which a rank counts as hung, and the job ends"
    )
    heartbeat_interval: PositiveFloat = Field(10.0, description="seconds between writes of the run's heartbeat.json")
    max_nonfinite: PositiveInt = Field(
        3, description="steps in a row, skipped because a loss or a gradient was not finite, at which the run stops"
    )
    spike_deviations: NonNegativeFloat = Field(
        10.0,
        description="warn of a loss this many deviations above the median of the last steps; 0: never. A deviation is "
        "1.4826 x the median absolute deviation, the standard deviation of a normal distribution",
    )
    spike_window: PositiveInt = Field(100, description="steps that make up that median")
    straggler_ratio: NonNegativeFloat = Field(
        1.25, description="warn of a rank whose own work takes this many times its peers' median; 0: never"
    )
