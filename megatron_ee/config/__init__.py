"""What a run is: one typed, frozen tree, read from strict YAML. Imports nothing of ours."""

from megatron_ee.config.errors import ConfigError
from megatron_ee.config.exit_losses import DistillationConfig, GateKind, GateLossConfig, WeightScheduleConfig
from megatron_ee.config.inference import (
    DecodingParallelConfig,
    DolaParams,
    ExitParams,
    InferenceConfig,
    KvCacheConfig,
    KvPolicy,
    SamplingParams,
    SchedulingParams,
    SledParams,
)
from megatron_ee.config.layerskip import LayerDropoutConfig, LayerSkipConfig
from megatron_ee.config.like import ModelReader
from megatron_ee.config.loader import (
    laid_over,
    load_config,
    open_config,
    open_tree,
    parse_override,
    read_tree,
    to_yaml,
    tree_of,
)
from megatron_ee.config.logging import LoggingConfig, ProfileConfig, WandbConfig
from megatron_ee.config.model import ExitsConfig, HeadKind, ModelConfig, Precision
from megatron_ee.config.operations import CheckpointConfig, FaultsConfig
from megatron_ee.config.parallel import ParallelConfig, StagePlacement
from megatron_ee.config.schema import Config
from megatron_ee.config.serving import AlarmsConfig, BoundsConfig, ServingConfig
from megatron_ee.config.training import BlendEntry, DataConfig, OptimizerConfig, TrainingConfig

__all__ = [
    "AlarmsConfig",
    "BlendEntry",
    "BoundsConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecodingParallelConfig",
    "DistillationConfig",
    "DolaParams",
    "ExitParams",
    "ExitsConfig",
    "FaultsConfig",
    "GateKind",
    "GateLossConfig",
    "HeadKind",
    "InferenceConfig",
    "KvCacheConfig",
    "KvPolicy",
    "LayerDropoutConfig",
    "LayerSkipConfig",
    "LoggingConfig",
    "ModelConfig",
    "ModelReader",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "ProfileConfig",
    "SamplingParams",
    "SchedulingParams",
    "ServingConfig",
    "SledParams",
    "StagePlacement",
    "TrainingConfig",
    "WandbConfig",
    "WeightScheduleConfig",
    "laid_over",
    "load_config",
    "open_config",
    "open_tree",
    "parse_override",
    "read_tree",
    "to_yaml",
    "tree_of",
]
