"""nestopt: associative-memory levels that are optimizers, layers and each other's learning rules."""

# ruff: noqa: E402  # some of these have to come before others
from nestopt._process import settle
from nestopt._version import VERSION

settle()  # before torch is imported

from nestopt import levels
from nestopt.core import (
    AssociativeMemory,
    Channels,
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
from nestopt.core.schedule import Schedule

# before anything that looks a name up
registry.add_builtin(levels)
for module, kind in (
    ("nestopt.train.data.builtin", "dataset"),
    ("nestopt.train.data.tasks", "task"),
    ("nestopt.optim", "optimizer"),
    ("nestopt.config.sizes", "model"),
    ("nestopt.train.schedule", "schedule"),
    ("nestopt.train.callbacks", "callback"),
    ("nestopt.train.loggers", "logger"),
    ("nestopt.commands", "command"),
):
    registry.add_builtin(module, kind)

from nestopt import core, models, nn, ops, optim, parts
from nestopt.api import describe, layer, model, optimizer
from nestopt.config import Config, ConfigError, build, load, to_spec

__version__ = VERSION

__all__ = [
    "AssociativeMemory",
    "Channels",
    "Config",
    "ConfigError",
    "Gate",
    "Heads",
    "Level",
    "Schedule",
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
