"""States are nested dicts of tensors. The few operations on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Any]
"""Nested dicts with string keys whose leaves are tensors."""


def tree_map(function: Callable[..., Tensor], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> State:
    """Apply `function` to each leaf of trees that have the same keys."""
    return {
        key: tree_map(function, value, *(other[key] for other in others))
        if isinstance(value, Mapping)
        else function(value, *(other[key] for other in others))
        for key, value in tree.items()
    }


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each leaf with its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(flat: Mapping[str, Any]) -> State:
    """The tree whose dotted paths are the keys of `flat`: the inverse of `dict(leaves(tree))`."""
    tree: State = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
