"""Some sequences of a batch begun anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.token_reference import PENDING
from nestopt.core.tree import State
from nestopt.nn.state import PAIRS


def begun_anew(state: Mapping[str, Any], start: Mapping[str, Any], rows: Tensor) -> State:
    """`state` of a batch with `rows` `[B]` (bool) of its tensors those of `start`; what has grown is not live there."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    if set(state) - {"mask"} == PAIRS:
        keys = state["keys"]
        mask = state["mask"] if "mask" in state else keys.new_ones((len(rows), keys.shape[2]), dtype=torch.bool)
        zeros = {name: choose(torch.zeros_like(state[name]), state[name]) for name in sorted(PAIRS)}
        return {**zeros, "mask": mask & ~rows[:, None]}
    found: State = {}
    for key, value in state.items():
        if key == PENDING:
            zeros = {name: choose(torch.zeros_like(value[name]), value[name]) for name in ("k", "v", "live")}
            found[key] = {**value, **zeros}  # gates stay in their range
        elif isinstance(value, Mapping):
            found[key] = begun_anew(value, start[key], rows)
        else:
            found[key] = choose(start[key], value)
    return found


def chosen(rows: Tensor, batch: int) -> Tensor:
    """`rows`, as numbers or bools, as a bool for each of `batch` sequences."""
    if rows.dtype == torch.bool:
        return rows
    return torch.zeros(batch, dtype=torch.bool, device=rows.device).index_fill(0, rows % batch, True)
