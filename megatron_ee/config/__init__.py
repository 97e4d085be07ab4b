"""What a run is: one typed, frozen tree, read from strict YAML. Imports nothing of ours."""

from megatron_ee.config.errors import ConfigError
from megatron_ee.config.loader import load_config, open_config, to_yaml
from megatron_ee.config.schema import (
    BlendEntry,
    CheckpointConfig,
    Config,
    DataConfig,
    ExitParams,
    ExitsConfig,
    HeadKind,
    InferenceConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    ServingConfig,
    StagePlacement,
    TrainingConfig,
    WandbConfig,
    WeightScheduleConfig,
)

__all__ = [
    "BlendEntry",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ExitParams",
    "ExitsConfig",
    "HeadKind",
    "InferenceConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "ServingConfig",
    "StagePlacement",
    "TrainingConfig",
    "WandbConfig",
    "WeightScheduleConfig",
    "load_config",
    "open_config",
    "to_yaml",
]
