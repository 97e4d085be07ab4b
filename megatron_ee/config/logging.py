"""The section `logging`: where a run reports."""

from typing import Literal

from pydantic import Field

from megatron_ee.config.fields import Layers, Names, PositiveInt, Section


class WandbConfig(Section):
    """A run on Weights & Biases. Where and as whom is in its own environment and login, never here."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="default: its own WANDB_MODE")
    tags: Names = ()


class ProfileConfig(Section):
    """A window of iterations under torch's profiler, which writes files to profiles/; these are slower."""

    start: PositiveInt = Field(description="the first iteration, counted from 1")
    iterations: PositiveInt = Field(1, description="how many; each has some thousands of operations to show")

    @property
    def all(self) -> range:
        """The iterations."""
        return range(self.start, self.start + self.iterations)


class LoggingConfig(Section):
    """Where a run reports, beside the console and metrics.jsonl, and how often."""

    interval: PositiveInt = Field(10, description="iterations between console lines and metrics.jsonl records")
    trace_iterations: Layers = Field(
        (), description="iterations, counted from 1, whose actions are timed and written to traces/; these are slower"
    )
    profile: ProfileConfig | None = None
    tensorboard: bool = Field(False, description="write event files into the run's folder")
    wandb: WandbConfig | None = None
