"""Which losses, gradients and weights are not finite: noted on the device, asked for when somebody waits anyway."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from nestopt.core.device import by_contract

NORM = "the norm of the gradient"


class Finite:
    """Notes of each step what was not finite in it, without a wait for the device.

    Attributes:
        step: the one that is taken now.
    """

    def __init__(self) -> None:
        self.step = 0
        self._names: list[tuple[int, str]] = []
        self._flags: list[Tensor] = []

    def watch(self, leaves: Iterable[tuple[str, Tensor]]) -> None:
        """Note the gradients of these from now on: those of this process, before they are averaged with others'."""
        for name, leaf in leaves:
            leaf.register_post_accumulate_grad_hook(partial(self._see, name))

    def _see(self, name: str, leaf: Tensor) -> None:
        if leaf.grad is not None:
            self.note(f"the gradient of {name}", leaf.grad)

    @torch.no_grad()
    def note(self, what: str, tensor: Tensor) -> None:
        """Note whether a tensor is finite."""
        self._names.append((self.step, what))
        self._flags.append(is_finite(tensor))

    @property
    def noted(self) -> bool:
        """Whether there are notes that nobody has asked for."""
        return bool(self._names)

    def end_step(self) -> None:
        """Keep what the step has noted in one tensor, where it is not asked for at once."""
        if len(self._flags) > 1:
            self._flags = [torch.cat([flag.reshape(-1) for flag in self._flags])]

    def take(self) -> tuple[int, str] | None:
        """Return the first step since the last call with something that was not finite, and what; waits for it."""
        self.end_step()
        flags, names = self._flags, self._names
        self._flags, self._names = [], []
        with by_contract("finite"):
            known: list[bool] = flags[0].reshape(-1).tolist()
        return next((name for name, finite in zip(names, known, strict=True) if not finite), None)


def is_finite(tensor: Tensor) -> Tensor:
    """Return whether all numbers of a tensor are finite, on its device, in one pass and without a copy of it."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor's
    if not local.numel():
        return torch.ones((), dtype=torch.bool, device=local.device)
    return torch.linalg.vector_norm(local, float("inf")).isfinite()


def first_not_finite(items: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor of real numbers that is not finite; waits for the device."""
    names, flags = [], []
    for name, tensor in items:
        if tensor.is_floating_point():
            names.append(name)
            flags.append(is_finite(tensor.detach()))
    known: list[bool] = torch.stack(flags).tolist() if flags else []
    return next((name for name, finite in zip(names, known, strict=True) if not finite), None)
