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
    """Yield each leaf with its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nested(flat: Mapping[str, Any]) -> State:
    """Return the tree whose dotted paths are the keys of `flat`: the inverse of `dict(leaves(tree))`."""
    tree: State = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def replaced(tree: Mapping[str, Any], flat: Mapping[str, Any], prefix: str = "") -> State:
    """Return `tree` with the leaves of `flat`, by dotted path, in the place of its own."""
    return {
        key: replaced(value, flat, f"{prefix}{key}.") if isinstance(value, Mapping) else flat.get(prefix + key, value)
        for key, value in tree.items()
    }


def store(old: State, new: Mapping[str, Any], direction: Tensor) -> Tensor:
    """Write `new` over the tensors of `old`, in place, and return `direction`, safe from that.

    Copied, never kept: a level may return the gradient itself as its state, or an old tensor under another key. Only a
    tensor that has changed its shape (a memory that grows) takes the place of the old one.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    written = {_storage(before[key]) for key, leaf in after.items() if leaf is not before[key]}
    for key, leaf in after.items():
        if leaf is not before[key] and _storage(leaf) in written:
            after[key] = leaf.clone()
    if _storage(direction) in written:
        direction = direction.clone()
    _write(old, nested(after))
    return direction


def _write(old: State, new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        have = old[key]
        if isinstance(value, Mapping):
            _write(have, value)
        elif value is not have:
            if have.shape == value.shape:
                have.copy_(value)
            else:
                old[key] = value.clone()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
