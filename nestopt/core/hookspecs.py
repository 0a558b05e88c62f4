"""The hooks that a plugin may implement. What nestopt brings itself comes in by the same ones.

A plugin is a module (or object) with any of these, marked with `@nestopt.hookimpl`, named by an entry point of the
group `nestopt`::

    @nestopt.hookimpl
    def nestopt_register_levels(register):
        register("lion", Lion)

and in its pyproject.toml::

    [project.entry-points.nestopt]
    lion = "nestopt_lion"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pluggy

PROJECT = "nestopt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Register = Callable[[str, type], None]
"""`register(name, class)`: makes the class known under a name that no other plugin has taken."""


@hookspec
def nestopt_register_levels(register: Register) -> None:
    """Register subclasses of `nestopt.Level`."""


@hookspec
def nestopt_register_memories(register: Register) -> None:
    """Register subclasses of `nestopt.core.Memory`."""


@hookspec
def nestopt_register_objectives(register: Register) -> None:
    """Register subclasses of `nestopt.core.Objective`."""


@hookspec
def nestopt_register_retentions(register: Register) -> None:
    """Register subclasses of `nestopt.core.Retention`."""


@hookspec
def nestopt_register_features(register: Register) -> None:
    """Register subclasses of `nestopt.core.Features`."""


@hookspec
def nestopt_register_outputs(register: Register) -> None:
    """Register subclasses of `nestopt.core.Output`."""


@hookspec
def nestopt_register_datasets(register: Register) -> None:
    """Register subclasses of `nestopt.train.data.Dataset`."""


@hookspec
def nestopt_register_tasks(register: Register) -> None:
    """Register subclasses of `nestopt.train.data.Task`."""


@hookspec
def nestopt_register_token_forms(register: Register) -> None:
    """Register subclasses of `nestopt.core.TokenForm`: ways to run levels on tokens, the package's own or others'."""


@hookspec
def nestopt_register_optimizers(register: Register) -> None:
    """Register subclasses of `torch.optim.Optimizer`, which are then attributes of `nestopt.optim`."""


@hookspec
def nestopt_register_models(register: Callable[[str, Mapping[str, Any]], None]) -> None:
    """Register the sections `model` of configurations by name, such as `hope-340m`."""


@hookspec
def nestopt_register_schedules(register: Register) -> None:
    """Register subclasses of `nestopt.train.schedule.Schedule`."""


@hookspec
def nestopt_register_callbacks(register: Register) -> None:
    """Register subclasses of `nestopt.train.callbacks.Callback`."""


@hookspec
def nestopt_register_loggers(register: Register) -> None:
    """Register subclasses of `nestopt.train.loggers.Logger`."""


@hookspec
def nestopt_register_commands(register: Register) -> None:
    """Register subclasses of `nestopt.command.Command`: what `nestopt NAME` does."""
