"""The configuration of a run and its command line."""

from zoscale.config.run_config import (
    RunConfig,
    build,
    check_adapter,
    exit_with,
    flatten,
    parse,
    parse_or_exit,
    validate,
)
from zoscale.config.schema import Method
from zoscale.config.sections import (
    CheckpointConfig,
    DataConfig,
    ForwardConfig,
    MeshConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from zoscale.config.strict_yaml import ConfigError, first_line, load_yaml, one_line, show

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "ForwardConfig",
    "MeshConfig",
    "Method",
    "ModelConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "build",
    "check_adapter",
    "exit_with",
    "first_line",
    "flatten",
    "load_yaml",
    "one_line",
    "parse",
    "parse_or_exit",
    "show",
    "validate",
]
