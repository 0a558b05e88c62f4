"""From a configuration to a model."""

from __future__ import annotations

from nestopt.config import ConfigError, ModelConfig
from nestopt.levels.continuum.level import Cms
from nestopt.models.hope import HopeLM


def build_model(section: ModelConfig) -> HopeLM:
    """Return the language model that the section `model` of a configuration describes.

    Raises:
        ConfigError: its `mlp` is not a `cms`.
    """
    if not isinstance(section.mlp, Cms):
        raise ConfigError.refuse("model.mlp", section.mlp, "give a cms, such as {level: cms, periods: [1, 16]}")
    return HopeLM(**{name: getattr(section, name) for name in ModelConfig.model_fields})
