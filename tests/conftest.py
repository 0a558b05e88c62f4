"""What every test starts from: one thread for each worker, seeded generators, and hypothesis without deadlines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

SEED = 0

# Two workers share the machine, and a process that a test starts must not take all of it either.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


class _TorchRandom:
    """Lets hypothesis seed torch before each example, so that a failing example fails again on replay."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis holds only a weak reference
hypothesis.register_random(_TORCH_RANDOM)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True, database=None)
hypothesis.settings.load_profile("reproducible" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for a test, whichever tests ran before it and on whichever worker."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(SEED)
    yield
    torch.set_default_dtype(dtype)
