"""YAML text to plain data and back. PyYAML is imported with this file, so this file is imported where it is used."""

from __future__ import annotations

import os
from typing import Any

import yaml

from nestopt.config.errors import ConfigError
from nestopt.config.values import DEPTH, ITEMS, check_size

LONGEST = 2**18
"""Characters of a file."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML forbids and PyYAML lets pass; and what PyYAML can't build."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of whatever kind: `!!float ''` is an IndexError
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            if isinstance(error, ValueError):
                problem += f" ({error})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > ITEMS:  # merged mappings multiply
            raise yaml.MarkedYAMLError(problem=f"more than {ITEMS:,} keys", problem_mark=node.start_mark)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            mark, name = key.start_mark, (key.tag, key.value)
            if name in lines:
                problem = f"the key {key.value!r} is given twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            lines[name] = mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Mappings as blocks; lists of plain values on one line; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flat = not any(isinstance(item, dict | list) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    # PyYAML writes these line breaks plainly, and then reads them as spaces
    style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)


def parse(text: str, source: str = "") -> Any:
    """Return the data that YAML `text` holds. Raises ConfigError with `source` and the line where it is not YAML."""
    try:
        if len(text) > LONGEST:
            raise yaml.YAMLError(f"more than {LONGEST:,} characters")
        data = yaml.load(text, _Loader)  # a SafeLoader
        check_size(data)
        return data
    except RecursionError:
        raise ConfigError(f"nested more than {DEPTH} deep", value=text, source=source or "YAML") from None
    except ConfigError as error:
        raise error.under("", source or "YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{error.problem}{context}", value=text, source=f"{source or 'YAML'}{line}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character, or a date, that can't be
        raise ConfigError(str(error), value=text, source=source or "YAML") from None


def read(path: str | os.PathLike[str]) -> Any:
    """Return the data in a YAML file. Raises ConfigError where that is not YAML, OSError where it can't be read."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)  # a device may go on for ever
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text ({error.reason} at byte {error.start})", value=str(path), source=str(path)
        ) from None
    return parse(text, str(path))


def dump(data: Any) -> str:
    """Return plain data as YAML, keys in their order."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text.removesuffix("...\n")  # PyYAML's end of a document that is one plain value
