"""Which continuum of MLPs each block of a configured model has."""

from __future__ import annotations

from collections.abc import Callable

from nestopt.config import ConfigError, ModelConfig
from nestopt.levels.continuum.level import Cms


def continua(section: ModelConfig) -> list[Cms]:
    """Return what follows the mixers, as given: one for all blocks, or what `to_the_last` makes one for each of.

    Raises:
        ConfigError: one is not a `cms`.
    """
    given = {f"model.mlps[{i}]": level for i, level in enumerate(section.mlps)} or {"model.mlp": section.mlp}
    for path, level in given.items():
        if not isinstance(level, Cms):
            raise ConfigError.refuse(path, level.label, "give a cms, such as {level: cms, periods: [1, 16]}")
    return [level for level in given.values() if isinstance(level, Cms)]


def learning(section: ModelConfig) -> Cms:
    """Return the first continuum that learns as the model reads; the first, if none does."""
    found = continua(section)
    return next((level for level in found if level.learn == "context"), found[0])


def with_learning(section: ModelConfig, change: Callable[[Cms], Cms]) -> ModelConfig:
    """Return `section` with others in the place of those that learn as the model reads; of all, if none does."""
    found, any_learns = continua(section), learning(section).learn == "context"
    new = [level if any_learns and level.learn != "context" else change(level) for level in found]
    return section.model_copy(update={"mlps": new} if section.mlps else {"mlp": new[0]})
