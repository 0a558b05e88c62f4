"""Configurations and stacks, from files and to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from nestopt.config.errors import ConfigError, show
from nestopt.config.files import nearest_file, write
from nestopt.config.overrides import apply, rivals
from nestopt.config.schema import Config
from nestopt.config.spec import as_saved, build, to_spec
from nestopt.config.values import check_size
from nestopt.core import Level

_C = TypeVar("_C", bound=Config | Level)
_Source = str | os.PathLike[str] | Mapping[str, Any]


# of a `type[_C]` checkers want that it be no abstract class, which Level is
@overload
def load(source: _Source, overrides: Iterable[str] = (), *, kind: Callable[..., _C]) -> _C: ...
@overload
def load(source: _Source, overrides: Iterable[str] = ()) -> Config | Level: ...
def load(source: _Source, overrides: Iterable[str] = (), *, kind: Any = (Config, Level)) -> Config | Level:
    """Load a configuration, or a stack on its own, from a YAML file or a mapping.

    Args:
        source: the path of a YAML file, or what one holds. A name, a list or a mapping with the key `level` is a stack;
            else it is a configuration, with any of the sections `model`, `optimizer`, `data` and `train`.
        overrides: `KEY=VALUE` each: `optimizer.lr=0.01`, or for a stack `beta=0.5`, `[1].period=4`.
        kind: `Config`, `Level` or a class of levels: what it has to be. Default: either.

    Returns:
        A `Config`, or a `Level` for a stack; with `kind` an instance of that.

    Raises:
        ConfigError: for a file that is not there or not YAML, an override that leads nowhere, for what does not fit
            the schema, and for what is not of the `kind`.

    >>> from nestopt.config import load
    >>> load({"level": "momentum"}, ["beta=0.5"]).beta
    0.5
    """
    data, name = (source, "") if isinstance(source, Mapping) else (_read(Path(source)), str(source))
    check_size(data)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    data = apply({} if data is None else data, overrides, complete=_complete)
    try:
        found = build("level", data) if _is_stack(data) else Config.from_data(data)
        if not isinstance(found, kind):
            what = "a configuration" if isinstance(found, Config) else f"a stack ({found.label})"
            raise ConfigError(f"it is {what}; give a {kind.__name__}")
        return found
    except ConfigError as error:
        keys = [override.partition("=")[0].strip() for override in overrides]
        raise error.said_in(lambda e: "" if any(_is_below(e.path, key) for key in keys) else name) from None


def load_saved(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Load the configuration that a run was saved with.

    As `load`, but a key beside another that stands in its place, which older versions let be, is left out.

    Raises:
        ConfigError: as `load`; for a stack, too.
    """
    data, name = _read(Path(path)), str(path)
    if _is_stack(data):
        raise ConfigError(f"{name} is a stack, not the configuration of a run")
    for _, section, key, other, nothing in rivals(data):
        if section.get(other, nothing) != nothing:
            section.pop(key, None)
    with as_saved():
        return Config.from_data(apply({} if data is None else data, overrides, complete=_complete), name)


def save(what: Config | Level, path: str | os.PathLike[str]) -> None:
    """Write a configuration or a stack as a YAML file that `load` reads back to an equal one.

    The file is replaced at once; its folder is made if need be. Raises ConfigError for a level that is not registered.
    """
    from nestopt.config.io import dump

    write(what.to_yaml() if isinstance(what, Config) else dump(to_spec(what)), path)


_YAML = (".yaml", ".yml")


def names_file(spec: object) -> bool:
    """Return whether a spec is the path of a file: a path object, or a string that ends in `.yaml` or `.yml`."""
    return isinstance(spec, os.PathLike) or (isinstance(spec, str) and Path(spec).suffix in _YAML)


def _complete(data: Any) -> Any:
    """Return `data` with every default written out; those of an empty configuration where it is not valid (yet)."""
    try:
        return Config.from_data(data).to_data()
    except ConfigError:
        return Config().to_data()


def _is_stack(data: Any) -> bool:
    return isinstance(data, str | list) or (isinstance(data, Mapping) and "level" in data)


def _is_below(path: str, key: str) -> bool:
    """Return whether a problem at `path` is one of what an override has put at `key`."""
    return path == key or path.startswith((f"{key}.", f"{key}["))


def _read(path: Path) -> Any:
    from nestopt.config.io import read

    try:
        return read(path)
    except FileNotFoundError:
        folder = path.parent
        where = (
            f"it is not in {str(folder.absolute())!r}"
            if folder.is_dir()
            else f"the folder {str(folder)!r} does not exist"
        )
        raise ConfigError(f"no file {str(path)!r}: {where}.{nearest_file(path, _YAML)}", value=str(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a folder; give a YAML file", value=str(path)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = getattr(error, "strerror", None) or error  # a ValueError: NUL in a path
        raise ConfigError(f"{show(str(path))} can't be read: {problem}", value=str(path)) from None
