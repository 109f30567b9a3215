"""The configuration of a run and its command line."""

from zoscale.config.run_config import RunConfig, build, check_adapter, exit_with, parse, parse_or_exit, validate
from zoscale.config.schema import Method
from zoscale.config.sections import (
    DataConfig,
    ModelConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from zoscale.config.strict_yaml import ConfigError, load_yaml

__all__ = [
    "ConfigError",
    "DataConfig",
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
    "load_yaml",
    "parse",
    "parse_or_exit",
    "validate",
]
