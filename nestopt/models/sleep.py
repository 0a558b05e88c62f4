"""A language model put to sleep: what its faster levels have learned goes to the slower ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nestopt.core.token_state import fitted
from nestopt.core.tree import State
from nestopt.models import next_token
from nestopt.models.hope_reading import blocks_of, through
from nestopt.models.loss_signal import TAUGHT
from nestopt.nn.consolidate import Consolidation, check_into, consolidate_all

if TYPE_CHECKING:
    from nestopt.models.hope import HopeLM


def asleep(
    model: HopeLM,
    state: Mapping[str, Any],
    tokens: Tensor,
    *,
    into: Literal["state", "parameters"],
    steps: int,
    lr: float,
) -> tuple[State, dict[str, Consolidation]]:
    """Do what `HopeLM.consolidate` says."""
    check_into(into)
    next_token.check_tokens(tokens, "HopeLM")
    now = fitted(state, model._shapes, tokens.shape[0], "HopeLM.consolidate")
    fresh = model.init_state(tokens.shape[0])
    begun = {name: {**part, "mlp": now[name]["mlp"]} for name, part in fresh.items() if name != TAUGHT}
    with torch.no_grad():
        _, inputs, _ = through(model, tokens, begun, None, "mixer")
    continua = {f"block_{i}": block.mlp for i, block in enumerate(blocks_of(model))}
    states = {name: now[name]["mlp"] for name in continua}
    after, found = consolidate_all(continua, states, inputs, into=into, steps=steps, lr=lr)
    return {**now, **{name: {**now[name], "mlp": mlp} for name, mlp in after.items()}}, found
