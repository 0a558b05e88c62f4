"""Configurations: a typed schema, YAML in and out, overrides, and errors that name the key."""

from nestopt.config.errors import ConfigError
from nestopt.config.load import load, save
from nestopt.config.schema import (
    Config,
    DataConfig,
    GroupConfig,
    ModelConfig,
    OptimizerConfig,
    RestConfig,
    TrainConfig,
    ViewConfig,
)
from nestopt.config.spec import as_saved, build, to_spec

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "GroupConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RestConfig",
    "TrainConfig",
    "ViewConfig",
    "as_saved",
    "build",
    "load",
    "save",
    "to_spec",
]
