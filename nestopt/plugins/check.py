"""`nestopt plugins check PACKAGE`: try all that an installed package provides."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from nestopt import testing
from nestopt.config import ConfigError, ModelConfig
from nestopt.config.spec import field_default, field_hints
from nestopt.core import Part, Refused, UnknownName
from nestopt.core.part import nearest
from nestopt.core.registry import Plugin, registry
from nestopt.models import build_model
from nestopt.train.errors import MissingExtra


class NotTried(Exception):
    """Something can't be tried here; says why."""


def check(package: str) -> int:
    """Print a line for each thing that a package provides: passed, FAILED and why, or not tried and why.

    Args:
        package: the name of a distribution, or of a plugin.

    Returns:
        1 if something failed or the plugin is skipped, else 0.

    Raises:
        ConfigError: no plugin is called so, or comes from a distribution of that name.
    """
    given = _normal(package)
    plugins = registry.plugins()
    found = [plugin for plugin in plugins if given in (_normal(plugin.name), _normal(plugin.source.split(" ")[0]))]
    if not found:
        known = [name for plugin in plugins for name in (plugin.name, plugin.source.split(" ")[0])]
        raise ConfigError(
            f"no plugin is called {package!r}, or comes from a package of that name.{nearest(package, known)}"
        )
    failed = False
    for plugin in found:
        print(f"{plugin.name} ({plugin.source}):")
        failed |= _check(plugin)
    return int(failed)


def _check(plugin: Plugin) -> bool:
    if plugin.blocked or plugin.error or not plugin.provides:
        said = "it is switched off" if plugin.blocked else plugin.error or "it provides nothing"
        print(f"  FAILED: {said}")
        return True
    failed = False
    for kind, name in plugin.provides:
        try:
            tried = CHECKS[kind](kind, name) if kind in CHECKS else None
            said = "passed" if kind in CHECKS else f"not tried: there is no check of a {kind}"
            said += f" ({tried})" if tried else ""
        except (NotTried, MissingExtra) as error:
            said = f"not tried: {error}"
        except Exception as error:
            failed = True
            said = f"FAILED: {'' if isinstance(error, AssertionError) else f'{type(error).__name__}: '}{error}"
        print(f"  {kind} {name}: {said}")
    return failed


def _made(kind: str, name: str) -> Any:
    """Return a part with the defaults of its fields."""
    cls: type[Part] = registry.get(kind, name)
    needs = [key for key in field_hints(cls) if field_default(cls, key) is dataclasses.MISSING]
    if needs:
        raise NotTried(f"it has no default for {' and '.join(needs)}; call nestopt.testing in tests of your own")
    return cls()


def _level(kind: str, name: str) -> None:
    testing.check_level(_made(kind, name))


def _part(kind: str, name: str) -> None:
    testing.check_part(_made(kind, name))


def _form(kind: str, name: str) -> str:
    form = registry.get(kind, name)
    tried, refused = [], []
    for level in form.levels:
        try:
            given = _made("level", registry.name_of(level) or "")
        except UnknownName:
            given = level()
        answer = form.accepts(given, torch.device("cpu"), torch.float64)
        if isinstance(answer, Refused):
            refused.append(f"{given.label}: {answer.words}")
            continue
        testing.check_form(form, given)
        tried.append(given.label)
    if not tried:
        raise NotTried(f"it takes none of its levels on the CPU in float64 ({'; '.join(refused)})")
    return f"on {', '.join(tried)}"


def _dataset(kind: str, name: str) -> None:
    testing.check_dataset(_made(kind, name))


def _task(kind: str, name: str) -> None:
    testing.check_task(_made(kind, name))


def _optimizer(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    testing.check_optimizer(lambda params: cls(params, lr=0.01))


def _model(kind: str, name: str) -> str:
    with torch.device("meta"):
        size = sum(p.numel() for p in build_model(ModelConfig(**registry.get(kind, name))).parameters())
    return f"{size:,} parameters"


def _schedule(kind: str, name: str) -> None:
    testing.check_schedule(_made(kind, name))


def _in_a_run(kind: str, name: str) -> None:
    testing.check_in_a_run(_made(kind, name))


def _command(kind: str, name: str) -> None:
    command = registry.get(kind, name)()
    command.arguments(parser := argparse.ArgumentParser(prog=f"nestopt {name}"))
    parser.format_help()
    assert command.help, f"{name}: it has no help; give it a line of it"


PARTS = ("memory", "objective", "retention", "features", "output")
CHECKS: dict[str, Callable[[str, str], str | None]] = {
    "level": _level,
    **dict.fromkeys(PARTS, _part),
    "token_form": _form,
    "dataset": _dataset,
    "task": _task,
    "optimizer": _optimizer,
    "model": _model,
    "schedule": _schedule,
    "callback": _in_a_run,
    "logger": _in_a_run,
    "command": _command,
}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
