"""The names of levels. In a module of its own: as `nestopt.levels.list` it hides Python's `list` where it stands."""

from __future__ import annotations

from fnmatch import fnmatchcase

from nestopt.core.registry import registry


def names(pattern: str = "*") -> list[str]:
    """Return the names of all registered levels, those of plugins too, that match `pattern`, sorted.

    Args:
        pattern: as of file names: `*` is anything, `?` one character, `[ab]` one of these. Default: all.

    >>> import nestopt
    >>> nestopt.levels.list("adam?")
    ['adamw']
    """
    return [name for name in registry.names("level") if fnmatchcase(name, pattern)]
