"""What an update of a parameter is, and the executor that makes one tensor after another, which defines all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance_, due
from nestopt.core.contract import whose
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.signal import Note, Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.levels.gradient.fused import Numbers
from nestopt.optim.layer_inputs.sums import Totals, keep, kept, means
from nestopt.optim.views import Split, advance_stack_, back, in_pieces, local, matrix_view, work_dtype

STEP, SUM, TRAINED = "step", "group_sum", "trained_weights"
"""The optimizer's own state keys: how often it has seen a gradient, what a group with a period has summed, and the
weights that it goes on from, while the parameter holds those to evaluate with."""


_LIES: tuple[Callable[[Tensor], Any], ...] = (Tensor.numel, Tensor.stride, attrgetter("dtype", "device"))
"""What of a tensor says how it lies in memory."""


def update(
    param: Tensor, direction: Tensor, lr: float | Tensor, decay: float | Tensor = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """Return `(1 - lr · decay) param - lr · direction`; written over `param` if that is given as `out`."""
    if isinstance(decay, Tensor) or decay:
        if out is not None and direction.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
            direction = direction.clone()  # a level may return the parameter itself
        param = torch.mul(param, 1 - lr * decay, out=out)
    if out is None or (isinstance(lr, Tensor) and lr.device.type != "cpu"):
        return torch.sub(param, lr * direction, out=out)  # has derivatives, and waits for no device
    return torch.add(param, direction, alpha=-float(lr), out=out)  # rounded once


def update_each_(
    params: list[Tensor], directions: list[Tensor], lr: float | Tensor, decay: float | Tensor = 0.0
) -> None:
    """Do as `update` for several parameters of one dtype and device, written over them, in as few launches."""
    on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
    if isinstance(decay, Tensor) or decay:
        keep = 1 - lr * decay
        torch._foreach_mul_(params, float(keep) if on_host else keep)
    if on_host:
        torch._foreach_add_(params, directions, alpha=-float(lr))
    else:
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """How the gradients of one group reach its level, and the directions its parameters.

    Attributes:
        lr: a number, or a tensor without dimensions.
        decay: decoupled weight decay.
        coupled: weight decay that is added to the gradient.
        maximize: ascend.
        period: of the group.
    """

    lr: float | Tensor
    decay: float | Tensor = 0.0
    coupled: float = 0.0
    maximize: bool = False
    period: int = 1

    def numbers(self) -> Numbers:
        """Return what torch's kernels are told; they read a learning rate on an accelerator in float32."""
        lr = self.lr.to(torch.float32) if isinstance(self.lr, Tensor) and self.lr.device.type != "cpu" else self.lr
        return Numbers(lr, self.decay, self.coupled, self.maximize)

    def gradient(self, grad: Tensor, param: Tensor | None) -> Tensor:
        """Return what the level is shown, `param` being None where no decay is coupled; `grad` stays as it is."""
        if self.maximize:
            grad = -grad
        if self.coupled:
            assert param is not None
            grad = grad.add(param, alpha=self.coupled)
        return grad


@dataclasses.dataclass
class Slot:
    """One parameter of an executor.

    Attributes:
        param: the parameter.
        state: as the optimizer keeps it: by flat keys, its step count included.
        tree: the same tensors as the level made them.
        view: as which matrices the level sees the parameter.
        place: its place among the parameters of its group.
    """

    param: Tensor
    state: dict[str, Any]
    tree: State
    view: Split | None = None
    place: int = 0

    def keep(self, leaves_by_path: dict[str, Tensor]) -> None:
        """Keep the state in these tensors from now on; they hold its numbers already."""
        self.state.update(leaves_by_path)
        self.tree = placed(self.tree, self.state)


def placed(tree: State, leaves_by_path: dict[str, Any], prefix: str = "") -> State:
    """Return `tree` with other leaves, given by their dotted paths."""
    found: State = {}
    for key, value in tree.items():
        path = prefix + key
        found[key] = placed(value, leaves_by_path, f"{path}.") if isinstance(value, dict) else leaves_by_path[path]
    return found


class Executor:
    """Steps parameters together. Subclasses gather tensors to be faster; this one goes from tensor to tensor.

    Args:
        level: what they run. Its numbers may change from step to step; what it is made of may not.
        slots: with equal step counts, on one device, in one dtype.

    Attributes:
        inputs: gives what the layer of a parameter was shown for its gradient.
        note: gives where the level of a parameter reports. Subclasses know neither.
    """

    inputs: Callable[[Tensor], Totals | None] | None = None
    note: Callable[[Tensor], Note] | None = None

    def __init__(self, level: Level, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.params = [slot.param for slot in slots]
        self.states = [slot.state for slot in slots]
        self.places = [slot.place for slot in slots]
        self.dtype = work_dtype(self.params[0]).to_real()
        self.count: Tensor = slots[0].state[STEP].clone()  # one for all, since they count alike
        for state in self.states:
            state[STEP] = self.count
        self.note_leaves()

    def note_leaves(self) -> None:
        """Take down how parameters and states lie, to see when someone else moves or replaces one."""
        trees = [dict(leaves(slot.tree)) for slot in self.slots]
        self.leaves = {path: [tree[path] for tree in trees] for path in trees[0]}
        self.layout = [list(map(of, self.params)) for of in _LIES]

    def intact(self) -> bool:
        """Return whether parameters and states still lie as this executor knows them."""
        if self.layout != [list(map(of, self.params)) for of in _LIES]:
            return False
        try:
            return all(map(is_, map(itemgetter(STEP), self.states), repeat(self.count))) and all(
                all(map(is_, map(itemgetter(path), self.states), own)) for path, own in self.leaves.items()
            )
        except KeyError:
            return False

    def leave(self) -> None:
        """Give every parameter a step count of its own again."""
        for state in self.states:
            if state.get(STEP) is self.count:
                state[STEP] = self.count.clone()

    def step(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings) -> None:
        """Step every parameter once, by `level` with its numbers as they are now."""
        self.count += 1
        step = int(self.count)
        if settings.period == 1:
            self.move(self.at_step(level, step), grads, settings, step)
            return
        for state, param in zip(self.states, self.params, strict=True):
            if SUM not in state:
                state[SUM] = torch.zeros_like(param, dtype=work_dtype(param))
        sums: list[Tensor] = [state[SUM] for state in self.states]
        torch._foreach_add_(sums, [grad.to(own.dtype) for grad, own in zip(grads, sums, strict=True)])
        if self.inputs is not None:
            for state, param in zip(self.states, self.params, strict=True):
                if (totals := self.inputs(param)) is not None:
                    keep(state, totals)
        if due(step, settings.period):
            step //= settings.period
            self.move(self.at_step(level, step), sums, settings, step)
            torch._foreach_zero_(sums)

    def at_step(self, level: Level, step: int) -> Level:
        """Return `level` with the numbers that its schedules give at this step."""
        return bind(level, step=step) if level.is_scheduled else level

    def move(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        """Write the gradients into the memories, and update the parameters."""
        grown = False
        for slot, grad in zip(self.slots, grads, strict=True):
            # only of levels that work entry by entry are parameters in pieces, or complex
            param, grad, view = local(slot.param), local(grad, slot.param), slot.view
            tree = tree_map(local, slot.tree) if in_pieces(slot.param) or slot.param.is_complex() else slot.tree
            if not param.numel():
                continue
            wide = param.to(self.dtype)  # a narrow parameter is stepped in the wide dtype and rounded once
            grad = settings.gradient(grad.to(self.dtype), wide)
            shown, inputs = matrix_view(grad, level, view), None
            if self.inputs is not None:
                inputs = means(self.inputs(param) if settings.period == 1 else kept(slot.state), grad, view)
            note = self.note(param) if self.note else None
            signal = Signal(step, matrix_view(wide, level, view), settings.lr, inputs, note)
            run = advance_stack_ if view is not None and view.stacked else advance_
            direction = run(level, shown, tree, signal)
            if direction.shape != shown.shape:
                raise wrong_shape(level, direction, shown)
            changed = {path: leaf for path, leaf in leaves(slot.tree) if slot.state[path] is not leaf}
            slot.state.update(changed)
            grown = grown or bool(changed)
            update(wide, back(direction.to(self.dtype), wide, view), settings.lr, settings.decay, out=wide)
            if wide is not param:
                param.copy_(wide)
        if grown:
            self.note_leaves()


def wrong_shape(level: Level, direction: Tensor, grad: Tensor) -> ValueError:
    """Return the error to raise where what a level has returned is no direction for `grad`."""
    return ValueError(
        f"{whose(level)}: step returned a direction of shape {tuple(direction.shape)} for a gradient of shape "
        f"{tuple(grad.shape)}; they must be the same"
    )
