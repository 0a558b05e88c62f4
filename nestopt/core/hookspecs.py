"""The hooks that a plugin may implement. The built-in levels and parts come in by the same ones.

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

from collections.abc import Callable

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
