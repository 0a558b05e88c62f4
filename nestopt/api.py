"""The public functions that take specs: a name, a level, plain data, or a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch.optim import Optimizer

from nestopt.config import Config, ModelConfig, build, load
from nestopt.config.load import names_file
from nestopt.config.sizes import named
from nestopt.core.level import Level
from nestopt.description import Description
from nestopt.description import describe as describe_object
from nestopt.levels.continuum.level import Cms
from nestopt.levels.deep.architectures import TitansBlock
from nestopt.models import HopeLM, build_model
from nestopt.nn import CMS, SequenceMemory, TitansMixer
from nestopt.nn import layer as make_layer
from nestopt.optim import optimizer
from nestopt.optim import optimizer as make_optimizer


@overload
def layer(spec: Cms | Literal["cms"], dim: int, heads: int = 4, **options: Any) -> CMS: ...
@overload
def layer(
    spec: TitansBlock | Literal["mac", "mag", "mal"], dim: int, heads: int = 4, **options: Any
) -> TitansMixer: ...
@overload
def layer(spec: Level | str, dim: int, heads: int = 4, **options: Any) -> SequenceMemory: ...
@overload
def layer(spec: Any, dim: int, heads: int = 4, **options: Any) -> SequenceMemory | CMS | TitansMixer: ...
def layer(spec: Any, dim: int, heads: int = 4, **options: Any) -> SequenceMemory | CMS | TitansMixer:
    """Return a level as a module on tokens: `y, state = layer(x, state=None)`, x and y `[B, T, dim]`.

    Args:
        spec: a level, its name, a mapping, a list (a chain), or the path of a YAML file that holds one.
        dim: width of the tokens.
        heads: memories side by side; they divide `dim`.
        options: of `nestopt.nn.SequenceMemory`, such as `conv`.

    Returns:
        A `CMS` for a `cms`; for any other level a `SequenceMemory`, and that is what a type checker takes a level or a
        name for that is not known to be a `cms`.

    Raises:
        ConfigError: a spec that can't be built.
        ValueError: sizes that do not fit.

    >>> import torch, nestopt
    >>> y, state = nestopt.layer("momentum", dim=8, heads=2)(torch.zeros(1, 5, 8))
    >>> y.shape
    torch.Size([1, 5, 8])
    """
    if names_file(spec):
        spec = load(spec)
    return make_layer(build("level", spec), dim, heads, **options)


def model(spec: Any = None) -> HopeLM:
    """Return a language model: `logits, state = model(tokens, state=None)`, tokens `[B, T]`, logits `[B, T, vocab]`.

    Args:
        spec: a config, its model section, a mapping of that section's keys, the path of a YAML file, or the name of a
            size, such as `"hope-340m"` (`nestopt.config.sizes`). None: the default.

    Raises:
        ConfigError: a spec that can't be built.
    """
    if names_file(spec):
        spec = load(spec)
    section = spec.model if isinstance(spec, Config) else named(spec) if isinstance(spec, str) else spec
    if section is None or isinstance(section, Mapping):
        section = ModelConfig(**(section or {}))
    return build_model(section)


def describe(thing: Any, optimizer: Optimizer | None = None, **options: Any) -> Description:
    """Anything as its ordered levels (NL Def. 2): print it, or take `.to_mermaid()` or `.to_svg()`.

    Args:
        thing: a level or a spec of one, an optimizer (torch's too), a module (any), or a config.
        optimizer: of the module.
        options: of `nestopt.description.describe`.
    """
    if isinstance(thing, str | os.PathLike | Mapping | Sequence):
        thing = load(thing) if names_file(thing) else build("level", thing)  # type: ignore[arg-type]  # a file is a path
    if isinstance(thing, Config):
        built = model(thing)
        return describe_object(built, make_optimizer(built, thing), **options)
    return describe_object(thing, optimizer, **options)


__all__ = ["describe", "layer", "model", "optimizer"]
