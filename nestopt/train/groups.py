"""The settings of parameter groups as plain values, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nestopt.optim.checkpoint import merged_group, plain_groups
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.optim.sharded.saved import Misfit


def group_settings(optimizer: Sharded) -> list[dict[str, Any]]:
    """Settings and names of each group; numbers that are tensors become numbers."""
    found = plain_groups(optimizer.param_groups)
    for group, names in zip(found, optimizer.names, strict=True):
        group.pop("params")
        group["param_names"] = list(names)
        group.update((key, value.item()) for key, value in list(group.items()) if isinstance(value, Tensor))
    return found


def load_group_settings(optimizer: Sharded, saved: Sequence[dict[str, Any]]) -> None:
    """Put settings back.

    Raises:
        Misfit: they are of another optimizer. Nothing has been changed then.
    """
    names = [list(group["param_names"]) for group in saved]
    if names != optimizer.names:
        raise Misfit("it has its parameters in other groups")
    try:
        merged = [
            merged_group(optimizer.nested, {**theirs, "params": group["params"]}, group, i)
            for i, (theirs, group) in enumerate(zip(saved, optimizer.param_groups, strict=True))
        ]
    except ValueError as error:
        raise Misfit(str(error)) from None
    for group, new in zip(optimizer.param_groups, merged, strict=True):
        group.update(new)
