"""Levels on gradients: one torch optimizer that runs any level or stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestopt.config.spec import build
from nestopt.core.clock import due
from nestopt.core.gates import bind
from nestopt.core.level import Descends, Level
from nestopt.core.signal import Signal
from nestopt.optim import checkpoint
from nestopt.optim.buckets import STEP, SUM, Item, Runner
from nestopt.optim.checks import check_gradients, check_group, check_parameters
from nestopt.optim.explain import Explanation, explain
from nestopt.optim.views import work_dtype


class Nested(Optimizer):
    r"""Runs a level, or a stack of them, on the gradients of parameters.

    $$W \leftarrow (1 - \mathrm{lr}\cdot\lambda)\,W - \mathrm{lr}\cdot u, \qquad u = \mathrm{stack}(g)$$

    It is a `torch.optim.Optimizer`: parameter groups, schedulers, closures, hooks and checkpoints work as there. State
    is in `state[p]` under readable keys (`"fast.momentum"`), in float32 or wider; `state_dict()` is plain tensors,
    numbers and strings. `nestopt.optimizer` builds one from a model and decides which parameters get the stack.

    Args:
        params: parameters, named parameters, or groups of either. A group may have its own `stack` (a level or a spec
            of one), `lr`, `weight_decay`, `period` and `maximize`.
        stack: the level, or a spec of one (a name, a mapping, a list for a chain).
        lr: step size, a number or a tensor of one element. Default 1e-3.
        weight_decay: decoupled, λ above. Default 0.
        period: on a group, accumulate gradients (their sum) and step once in so many calls; parameters stay as they
            are in between (NL eq. 71). Default 1.
        maximize: ascend instead. Default False.

    Raises:
        ValueError: a value out of range, a level of matrices (muon) given a parameter that is none, a parameter that
            is complex or comes twice.
    """

    renamed: ClassVar[dict[str, str]] = {}
    """State keys of torch's optimizer of the same name, and ours: its checkpoints load here."""

    def __init__(
        self,
        params: Iterable[Any],
        stack: Any = "gd",
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        period: int = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "stack": build("level", stack, "stack"),
            "lr": lr,
            "weight_decay": weight_decay,
            "period": period,
            "maximize": maximize,
        }
        self._start(params, defaults)

    def _start(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._runner = Runner()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it may have its own `stack`. Nothing is added if anything in it is wrong."""
        group = {**self.defaults, **param_group}
        if "stack" in group:
            group["stack"] = build("level", group["stack"], f"param_groups[{len(self.param_groups)}].stack")
            param_group = {**param_group, "stack": group["stack"]}
        check_group(group)
        index = len(self.param_groups)
        super().add_param_group(param_group)
        added = self.param_groups[index]
        try:
            check_parameters(added, index, self.level(added))
        except Exception:
            self.param_groups.pop()
            raise

    def level(self, group: dict[str, Any]) -> Level:
        """The level that a parameter group runs."""
        return group["stack"]

    def coupled(self, group: dict[str, Any]) -> bool:
        """Whether a group's weight decay is added to the gradient (L2) instead of taken off the weights."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; others, and their state, are not touched.

        Args:
            closure: computes the loss anew and returns it, as in torch.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        level, period, items = bind(self.level(group)), group.get("period", 1), []
        for param in group["params"]:
            if param.grad is None or not param.numel():
                continue
            state = self.state[param]
            if not state:
                state[STEP] = torch.zeros(())
                state.update(self._runner.start(level, param))
            state[STEP] += 1
            count = int(state[STEP])
            grad = self._gradient(param, group)
            if period > 1:
                total = state.setdefault(SUM, torch.zeros_like(grad))
                total += grad
                if not due(count, period):
                    continue
                grad, count = total.clone(), count // period
                total.zero_()
            items.append(Item(param, grad, state, count))
        self._move(level, items, group)

    def _move(self, level: Level, items: list[Item], group: dict[str, Any]) -> None:
        """Step the parameters of `items`: in place where the level can, else along the directions it gives."""
        lr, decay = group["lr"], 0.0 if self.coupled(group) else group["weight_decay"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        if isinstance(level, Descends) and level.period == 1 and not _on_device(lr):
            rate = float(lr)
            for item in [item for item in items if item.param.dtype == item.grad.dtype]:
                if decay:
                    item.param.mul_(1 - lr * decay)
                level.descend(item.param, item.grad, item.state, Signal(item.step, item.param), rate)
            items = [item for item in items if item.param.dtype != item.grad.dtype]
        for item, direction in self._runner.run(level, items):
            _apply(item.param, direction, lr, decay)

    def _gradient(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = param.grad.to(work_dtype(param))  # type: ignore[union-attr]
        if group["maximize"]:
            grad = -grad
        if self.coupled(group) and group["weight_decay"] != 0:
            grad = grad.add(param, alpha=group["weight_decay"])
        return grad

    def explain(self) -> Explanation:
        """For each parameter: which level has it, at which learning rate and period, and why. Print it."""
        return explain(self)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and groups as tensors, numbers, strings, lists and dicts: loads under `weights_only=True`."""
        return checkpoint.to_plain(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit: tensors are copied and keep their dtype.

        Checkpoints of torch's optimizer of the same name load into the named classes too.

        Raises:
            ValueError: groups, parameters or state do not fit this optimizer. Nothing has been changed then.
        """
        checkpoint.load(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._runner = Runner()


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _apply(param: Tensor, direction: Tensor, lr: float | Tensor, decay: float) -> None:
    # a narrow parameter is stepped in the wide dtype and rounded once
    wide = param if param.dtype == direction.dtype else param.to(direction.dtype)
    if decay:
        wide.mul_(1 - lr * decay)
    if _on_device(lr):
        wide.sub_(direction * lr)  # stays there: nothing waits for its value
    else:
        wide.add_(direction, alpha=-float(lr))
    if wide is not param:
        param.copy_(wide)
