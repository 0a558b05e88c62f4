"""A language model put to sleep: what its faster levels have learned goes to the slower ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nestopt.core.tree import State
from nestopt.models.hope_reading import Model, blocks_of, through
from nestopt.models.loss_signal import TAUGHT
from nestopt.nn.consolidate import Consolidation, consolidate_all


def asleep(
    model: Model,
    state: State,
    fresh: State,
    tokens: Tensor,
    *,
    into: Literal["state", "parameters"],
    steps: int,
    lr: float,
) -> tuple[State, dict[str, Consolidation]]:
    """Do what `HopeLM.consolidate` says; `fresh` is the state before the first token."""
    begun = {name: {**part, "mlp": state[name]["mlp"]} for name, part in fresh.items() if name != TAUGHT}
    with torch.no_grad():
        _, inputs, _ = through(model, tokens, begun, None, "mixer")
    continua = {f"block_{i}": block.mlp for i, block in enumerate(blocks_of(model))}
    states = {name: state[name]["mlp"] for name in continua}
    after, found = consolidate_all(continua, states, inputs, into=into, steps=steps, lr=lr)
    return {**state, **{name: {**state[name], "mlp": mlp} for name, mlp in after.items()}}, found
