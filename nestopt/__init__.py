"""nestopt: associative-memory levels that are optimizers, layers and each other's learning rules."""

from nestopt import levels
from nestopt.core import (
    AssociativeMemory,
    Gate,
    Level,
    Signal,
    chain,
    hookimpl,
    nest,
    parallel,
    registry,
)

registry.add_builtin(levels)
