"""From a configuration to a model."""

from __future__ import annotations

import torch

from nestopt.config import ConfigError, ModelConfig
from nestopt.core.level import Level
from nestopt.models.continua import continua
from nestopt.models.hope import HopeLM
from nestopt.models.size import check_fits
from nestopt.nn.hope import HopeBlock


def build_model(section: ModelConfig) -> HopeLM:
    """Return the language model that the section `model` of a configuration describes.

    Raises:
        ConfigError: its `mlp` is not a `cms`, a level can't mix tokens, or there is not as much memory.
    """
    continua(section)
    try:
        check_fits(section)
        return HopeLM(**{name: getattr(section, name) for name in ModelConfig.model_fields})
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), _at_fault(section)) from error


def _at_fault(section: ModelConfig) -> str:
    """Return the key of the first mixer with which no block can be made; if there is none, the section's."""
    given: dict[str, Level] = {f"model.mixers[{i}]": level for i, level in enumerate(section.mixers)}
    for path, level in (given or {"model.mixer": section.mixer}).items():
        try:
            with torch.device("meta"):
                options = {name: getattr(section, name) for name in ("heads", "conv", "gate_output")}
                HopeBlock(section.dim, mixer=level, kv_heads=section.kv_heads or None, **options)
        except (ValueError, TypeError):
            return path
    return "model"
