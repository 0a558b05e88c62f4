"""One use of a layer, between its forward and its backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from nestopt.core.device import no_autocast
from nestopt.optim.layer_inputs.rows import rows_of
from nestopt.optim.layer_inputs.sums import Sums

Scale = float | Callable[[], float]
"""What the loss was multiplied with: a number, or what gives it."""


class Use(ABC):
    """Called with the gradient of the layer's output, once for each backward pass; then the use counts."""

    def __init__(self, add_to: Callable[[], Sums], module: nn.Module) -> None:
        self.add_to, self.module = add_to, module

    def __call__(self, grad: Tensor) -> None:
        keep = _graph_is_kept()
        with torch.no_grad(), no_autocast(grad.device):
            self.count(grad, self.add_to(), keep)
        if not keep:
            self.__dict__.clear()  # the graph may live on for long, as the user's loss

    @abstractmethod
    def count(self, grad: Tensor, sums: Sums, keep: bool) -> None:
        """Add the use to the sums; what it holds is copied if it is to `keep` it."""


class Many(Use):
    """Holds the products, of the weight's size, and no rows."""

    def __init__(self, add_to: Callable[[], Sums], module: nn.Module, x: Tensor, y: Tensor, own: Sums) -> None:
        super().__init__(add_to, module)
        self.own = own
        with torch.no_grad():
            rows = rows_of(module, x)
            own.add(rows, rows.outputs(y.detach()), _bias(module))

    def count(self, grad: Tensor, sums: Sums, keep: bool) -> None:
        sums.merge(self.own, keep)


class Few(Use):
    """Holds the rows, where they are smaller than the weight: a cell of a recurrent network has many uses."""

    def __init__(self, add_to: Callable[[], Sums], module: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(add_to, module)
        self.kept = _keep(x.detach(), y.detach().clone())  # y may be changed in place

    def count(self, grad: Tensor, sums: Sums, keep: bool) -> None:
        x, y = _saved(self.kept)
        rows = rows_of(self.module, x)
        sums.add(rows, rows.outputs(y), _bias(self.module))


class WithSurprise(Use):
    """Holds the inputs, as the layer itself does; its output is made once more."""

    def __init__(
        self, add_to: Callable[[], Sums], module: nn.Module, x: Tensor, dtype: torch.dtype, scale: Scale | None
    ) -> None:
        super().__init__(add_to, module)
        self.kept, self.dtype, self.scale = _keep(x.detach()), dtype, scale

    def count(self, grad: Tensor, sums: Sums, keep: bool) -> None:
        (x,), errors_of = _saved(self.kept), sums.wants.grad
        rows = rows_of(self.module, x)
        if errors_of is None or not rows.n:
            return
        scale = 1.0 if self.scale is None else self.scale() if callable(self.scale) else self.scale
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        y = rows.read(weight, self.dtype)
        sums.add(rows, y)
        surprise = grad.to(sums.dtype) * (rows.n / scale)
        errors = errors_of(y.to(sums.dtype).movedim(1, -1), rows.outputs(surprise).movedim(1, -1))
        sums.add_grad(rows, errors.movedim(-1, 1).to(self.dtype))


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def few(x: Tensor, y: Tensor, weight: Tensor) -> bool:
    """Return whether a layer's inputs and outputs are smaller together than its weight."""
    return x.numel() + y.numel() < weight.numel()


class _Keep(torch.autograd.Function):
    """Saves tensors as autograd does: activation checkpointing drops them and finds them again."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


def _keep(*tensors: Tensor) -> Tensor:
    """Save `tensors` for as long as what is returned is held; in torch 2.11 its node alone does not hold them."""
    with torch.enable_grad():
        return cast(Tensor, _Keep.apply(torch.empty(0, requires_grad=True), *tensors))


def _saved(kept: Tensor) -> tuple[Tensor, ...]:
    """Return what was given to `_keep`; recomputed where it was dropped."""
    return cast(Any, kept.grad_fn).saved_tensors


def _graph_is_kept() -> bool:
    """Return whether the graph of the present backward pass may be used again (`retain_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
