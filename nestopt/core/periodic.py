"""Modules that say how often the optimizer changes their parameters."""

from __future__ import annotations


class Periodic:
    """Have the optimizer change a module's parameters once in `period` steps, on their summed gradients (NL eq. 71).

    A class of modules derives from this one to say so: `class Slow(Periodic, nn.Module)`. An attribute that happens to
    be called `period` says nothing to the optimizer.

    Attributes:
        period: optimizer steps between two changes of all parameters within the module, 1 or more.
    """

    period: int = 1
