"""Which continuum of MLPs each block of a configured model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nestopt.config import ConfigError, ModelConfig
from nestopt.config.spec import to_spec
from nestopt.levels.continuum.level import Cms
from nestopt.nn.hope import to_the_last


def continua(section: ModelConfig) -> list[Cms]:
    """Return what follows the mixer of each block.

    Raises:
        ConfigError: one is not a `cms`.
    """
    given = {f"model.mlps[{i}]": level for i, level in enumerate(section.mlps)} or {"model.mlp": section.mlp}
    for path, level in given.items():
        if not isinstance(level, Cms):
            raise ConfigError.refuse(path, level.label, "give a cms, such as {level: cms, periods: [1, 16]}")
    return to_the_last([level for level in given.values() if isinstance(level, Cms)], section.blocks)


def learning(section: ModelConfig) -> Cms:
    """Return how those continua learn that do so as the model reads; all, if none does.

    Raises:
        ConfigError: they have rules of their own, so that there is no one rule to choose or to compare by.
    """
    found = continua(section)
    found = [level for level in found if level.learn == "context"] or found
    other = next((one for one in found if dataclasses.replace(one, memory=found[0].memory) != found[0]), None)
    if other is not None:
        allowed = "it learns by another rule than the MLPs before it; give one rule to all that learn"
        raise ConfigError.refuse("model.mlps", to_spec(other), allowed)
    return found[0]


def with_learning(section: ModelConfig, change: Callable[[Cms], Cms]) -> ModelConfig:
    """Return `section` with others in the place of those that learn as the model reads; of all, if none does."""
    found = continua(section)
    any_learns = any(level.learn == "context" for level in found)
    new = [level if any_learns and level.learn != "context" else change(level) for level in found]
    return section.model_copy(update={"mlps": new} if section.mlps else {"mlp": new[0]})
