"""The state of torch's generators, as tensors, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return torch's generators, as tensors."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)
