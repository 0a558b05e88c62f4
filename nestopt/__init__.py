"""nestopt: associative-memory levels that are optimizers, layers and each other's learning rules."""

# ruff: noqa: E402  # some of these have to come before others
from nestopt._process import settle
from nestopt._version import VERSION

settle()  # before torch is imported

from nestopt import levels
from nestopt.core import (
    AssociativeMemory,
    Gate,
    Heads,
    Level,
    Signal,
    chain,
    hookimpl,
    nest,
    parallel,
    registry,
)

# before anything that looks a name up
registry.add_builtin(levels)
registry.add_builtin("nestopt.train.data.builtin", kind="dataset")
registry.add_builtin("nestopt.train.data.tasks", kind="task")

from nestopt import core, models, nn, ops, optim, parts
from nestopt.api import describe, layer, model, optimizer
from nestopt.config import Config, ConfigError, build, load, to_spec

__version__ = VERSION

__all__ = [
    "AssociativeMemory",
    "Config",
    "ConfigError",
    "Gate",
    "Heads",
    "Level",
    "Signal",
    "build",
    "chain",
    "core",
    "describe",
    "hookimpl",
    "layer",
    "levels",
    "load",
    "model",
    "models",
    "nest",
    "nn",
    "ops",
    "optim",
    "optimizer",
    "parallel",
    "parts",
    "registry",
    "to_spec",
]
