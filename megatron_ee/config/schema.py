"""The typed tree behind every YAML file: frozen, strict, and complete (defaults are filled in, nothing mutates it).

Layers are counted from 1, and "exit layer E" always means the number of layers run. The final output is the
exit after the last layer: it has loss weight 1 and is never listed.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_ee.config.checks import InvalidFieldsError, problems_of
from megatron_ee.config.fields import Names, Section
from megatron_ee.config.inference import InferenceConfig
from megatron_ee.config.logging import LoggingConfig
from megatron_ee.config.model import ExitsConfig, ModelConfig
from megatron_ee.config.operations import CheckpointConfig, FaultsConfig
from megatron_ee.config.parallel import ParallelConfig
from megatron_ee.config.serving import ServingConfig
from megatron_ee.config.training import DataConfig, OptimizerConfig, TrainingConfig


class Config(Section):
    """Everything that describes a run. One YAML file holds it; the resolved tree is saved beside the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runs: str = Field("runs", description="the folder that holds run folders")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when every local rank has a GPU")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy takes
    plugins: Names = Field((), description="Python files with policies, schedules and optimizers of one's own")
    model: ModelConfig
    exits: ExitsConfig = ExitsConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    inference: InferenceConfig = InferenceConfig()
    serving: ServingConfig = ServingConfig()

    @field_validator("exits", mode="before")
    @classmethod
    def _list_all_layers(cls, exits: Any, info: ValidationInfo) -> Any:
        """`layers: all`, as the list that it stands for."""
        if not isinstance(exits, dict) or exits.get("layers") != "all":
            return exits
        model = info.data.get("model")
        if model is None:  # invalid itself: of the exits only that is looked at which goes with any number of them
            return {name: value for name, value in exits.items() if name != "layers" and not isinstance(value, list)}
        return {**exits, "layers": list(range(1, model.num_layers))}

    @property
    def depth(self) -> int:
        """Layers that training runs: all of them, or, where only exits are trained, those up to the last one."""
        return self.model.num_layers if self.training.trains == "all" else max(self.exits.layers, default=0)

    @property
    def trained_exits(self) -> tuple[int, ...]:
        """The exits that training has, ascending: the final one last, unless only early exits are trained."""
        return self.exits.layers if self.training.trains == "exits" else (*self.exits.layers, self.model.num_layers)

    @field_validator("exits")
    @classmethod
    def _fill_exit_weights(cls, exits: ExitsConfig, info: ValidationInfo) -> ExitsConfig:
        """Default weights grow with depth: 0.25 at a quarter of the layers, 0.5 at half of them."""
        model = info.data.get("model")  # absent when it is itself invalid
        if model is None or exits.weights or exits.layerskip is not None:
            return exits
        return exits.model_copy(update={"weights": tuple(layer / model.num_layers for layer in exits.layers)})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(problems_of(self)):
            raise InvalidFieldsError(problems)
        return self
