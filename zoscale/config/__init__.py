"""The configuration of a run and its command line."""

from zoscale.config.command_line import at_least, read_yaml
from zoscale.config.run_config import RunConfig, build, flatten, parse, validate
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
from zoscale.config.strict_yaml import ConfigError, did_you_mean, first_line, load_yaml, one_line, show
from zoscale.config.table import Table, imported

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
    "Table",
    "TrackingConfig",
    "TrainConfig",
    "at_least",
    "build",
    "did_you_mean",
    "first_line",
    "flatten",
    "imported",
    "load_yaml",
    "one_line",
    "parse",
    "read_yaml",
    "show",
    "validate",
]
